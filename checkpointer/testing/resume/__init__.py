"""``assert_resume_exact``: a run, the same run interrupted, and what differs."""
