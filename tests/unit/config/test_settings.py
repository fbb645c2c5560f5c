"""The configuration file: what is accepted, and that every refusal names the file, the line and the key."""

from __future__ import annotations

import os
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer.config.settings import Config, RestorePolicy, WritePolicy
from checkpointer.errors import ConfigError
from checkpointer.policy.retention import BestRule, KeepPolicy
from checkpointer.policy.schedule import SavePolicy

CONFIGS = Path(__file__).parents[3] / "configs"

# Every key with a value that is not its default.
FULL = """\
save:
  every_n_steps: 500
  every_n_epochs: 1
  every: 30min
  on_signal: [SIGTERM, SIGINT]
keep:
  last: 3
  best: {k: 2, monitor: val_loss, mode: min}
  every_n_steps: 10_000
  every: 12h
  within: 2d
  max_size: 500GB
write:
  mode: sync
  durable: false
  share: false
  on_full: skip
restore:
  verify: before
require_resume: false
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Writes text or bytes to ``run.yaml`` and reads it as a configuration."""
    monkeypatch.chdir(tmp_path)

    def write_and_read(content):
        Path("run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return Config.from_yaml("run.yaml")

    return write_and_read


@pytest.fixture
def refusal(load):
    """The message with which a file is refused."""

    def refused(content):
        with pytest.raises(ConfigError) as caught:
            load(content)
        message = str(caught.value)
        assert len(message) < 1000
        assert os.listdir() == ["run.yaml"], "a configuration that makes files"
        return message

    return refused


# What is accepted


def test_every_key_is_read(load):
    assert load(FULL) == Config(
        save=SavePolicy(
            every_n_steps=500, every_n_epochs=1, every=timedelta(minutes=30), on_signal=("SIGTERM", "SIGINT")
        ),
        keep=KeepPolicy(
            last=3,
            best=BestRule(k=2, monitor="val_loss", mode="min"),
            every_n_steps=10_000,
            every=timedelta(hours=12),
            within=timedelta(days=2),
            max_size=500 * 10**9,
        ),
        write=WritePolicy(mode="sync", durable=False, share=False, on_full="skip"),
        restore=RestorePolicy(verify="before"),
        require_resume=False,
    )


def test_the_defaults_save_at_every_call_and_keep_everything():
    config = Config()
    assert config.save == SavePolicy(every_n_steps=None, every_n_epochs=None, every=None, on_signal=())
    assert config.keep == KeepPolicy(last=None, best=(), every_n_steps=None, every=None, within=None, max_size=None)
    assert (config.write.mode, config.write.durable, config.write.share) == ("async", True, 8)
    assert (config.restore.verify, config.require_resume) == ("stream", True)


@pytest.mark.parametrize("content", ["", "# nothing\n", "---\n", "null\n", "{}\n", "save:\nkeep:\nwrite:\nrestore:\n"])
def test_a_file_that_says_nothing_means_the_defaults(load, content):
    assert load(content) == Config()


def test_a_byte_order_mark_is_no_part_of_the_first_key(load):
    assert load(b"\xef\xbb\xbfrequire_resume: false\n") == Config(require_resume=False)


def test_a_single_signal_is_a_list_of_one(load):
    assert load("save:\n  on_signal: SIGTERM\n").save.on_signal == ("SIGTERM",)


def test_several_best_rules_are_a_list(load):
    text = "keep:\n  best:\n  - {monitor: loss}\n  - monitor: acc\n    mode: max\n"
    assert load(text).keep.best == (BestRule(monitor="loss"), BestRule(monitor="acc", mode="max"))


@pytest.mark.parametrize("spelling", ["1%", "0.01", "'1 %'", "1.0%", "1.0e-2"])
def test_an_overhead_is_a_percentage_or_a_number(load, spelling):
    save = load(f"save:\n  every: auto\n  max_overhead: {spelling}\n  mtbf: 1d\n").save
    assert save == SavePolicy(every="auto", max_overhead=0.01, mtbf=timedelta(days=1))


@pytest.mark.parametrize("spelling", ["off", '"off"', "false", "no"])
def test_verify_off_needs_no_quotes_although_yaml_makes_it_a_boolean(load, spelling):
    assert load(f"restore:\n  verify: {spelling}\n").restore.verify == "off"


@pytest.mark.parametrize("spelling, expected", [("yes", True), ("on", True), ("no", False), ("off", False)])
def test_the_old_spellings_of_booleans_are_booleans_where_one_is_wanted(load, spelling, expected):
    assert load(f"require_resume: {spelling}\n").require_resume is expected


def test_an_alias_repeats_a_value(load):
    config = load("save:\n  every: &often 30min\nkeep:\n  within: *often\n")
    assert config.keep.within == config.save.every == timedelta(minutes=30)


def test_sections_may_be_policy_objects():
    save = SavePolicy(every="1h")
    assert Config.from_mapping({"save": save, "keep": {"last": 2}}) == Config(save=save, keep=KeepPolicy(last=2))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_is_valid_and_survives_a_round_trip(path):
    config = Config.from_yaml(path)
    assert Config.from_mapping(yaml.safe_load(config.to_yaml())) == config


def test_the_shipped_files_are_the_documented_ones():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names >= {"auto", "default", "laptop", "pretraining", "preemptible", "lora", "sweep"}


def test_the_file_for_a_measured_interval_says_what_the_defaults_are():
    assert Config.from_yaml(CONFIGS / "auto.yaml").save == SavePolicy(every="auto", on_signal=["SIGTERM"])


def test_the_default_file_shows_every_key_with_its_default():
    shown = yaml.safe_load((CONFIGS / "default.yaml").read_text(encoding="utf-8"))
    assert shown == yaml.safe_load(Config().to_yaml())
    assert Config.from_mapping(shown) == Config()


def test_to_yaml_is_readable():
    config = Config(
        save=SavePolicy(every="30min", on_signal="SIGTERM"),
        keep=KeepPolicy(best={"monitor": "val_loss"}, within="36h", max_size="500GB"),
        restore=RestorePolicy(verify="off"),
    )
    assert config.to_yaml() == (
        "save:\n"
        "  every_n_steps: null\n"
        "  every_n_epochs: null\n"
        "  every: 30min\n"
        "  max_overhead: null\n"
        "  mtbf: null\n"
        "  on_signal:\n"
        "  - SIGTERM\n"
        "  deadline: null\n"
        "  on_metric: false\n"
        "keep:\n"
        "  last: null\n"
        "  best:\n"
        "  - monitor: val_loss\n"
        "    k: 1\n"
        "    mode: min\n"
        "  every_n_steps: null\n"
        "  every: null\n"
        "  within: 36h\n"
        "  max_size: 500GB\n"
        "write:\n"
        "  mode: async\n"
        "  durable: true\n"
        "  share: 8\n"
        "  threads: 2\n"
        "  on_full: error\n"
        "  rank_timeout: 30min\n"
        "restore:\n"
        "  verify: 'off'\n"
        "require_resume: true\n"
    )


counts = st.none() | st.integers(1, 2**63 - 1)
durations = st.none() | st.timedeltas(min_value=timedelta(microseconds=1))
monitors = st.text(min_size=1).filter(str.isprintable) | st.sampled_from(["yes", "null", "1:30", " x ", "0", "~", "#"])
signals = st.lists(st.sampled_from(["SIGTERM", "SIGINT"]))
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True) | st.sampled_from([0.01, 0.005, 0.5, 0.0725])
configs = st.builds(
    Config,
    save=st.builds(SavePolicy, every_n_steps=counts, every_n_epochs=counts, every=durations, on_signal=signals)
    | st.builds(
        SavePolicy, every=st.just("auto"), max_overhead=st.none() | fractions, mtbf=durations, on_signal=signals
    ),
    keep=st.builds(
        KeepPolicy,
        last=counts,
        best=st.lists(
            st.builds(BestRule, k=st.integers(1, 9), monitor=monitors, mode=st.sampled_from(["min", "max"])), max_size=3
        ),
        every_n_steps=counts,
        every=durations,
        within=durations,
        max_size=counts,
    ),
    write=st.builds(
        WritePolicy,
        mode=st.sampled_from(["sync", "async", "lazy"]),
        durable=st.booleans(),
        share=st.just(False) | st.integers(1, 100),
        threads=st.integers(1, 64),
        on_full=st.sampled_from(["error", "prune", "skip"]),
    ),
    restore=st.builds(RestorePolicy, verify=st.sampled_from(["stream", "before", "off"])),
    require_resume=st.booleans(),
)


@settings(deadline=None)
@given(configs)
def test_every_configuration_survives_a_round_trip(tmp_path_factory, config):
    text = config.to_yaml()
    assert Config.from_mapping(yaml.safe_load(text)) == config
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(text, encoding="utf-8")
    assert Config.from_yaml(path) == config


def test_a_configuration_can_be_pickled_and_hashed():
    config = Config.from_mapping(yaml.safe_load(FULL))
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(Config.from_mapping(yaml.safe_load(FULL)))


# What is refused: values, with their key and line


@pytest.mark.parametrize(
    "content, message",
    [
        # unknown keys
        ("kep:\n  last: 3\n", "1: kep: unknown key; did you mean keep? (known: save, keep, write, restore, require_re"),
        ("\n\nkeep:\n  lst: 3\n", "4: keep.lst: unknown key; did you mean last? (known: last, best, "),
        ("keep:\n  best:\n    monitor: x\n    mod: max\n", "4: keep.best.mod: unknown key; did you mean mode?"),
        ("zzz: 1\n", "1: zzz: unknown key (known: save"),
        ("save:\n  <<: {every: 1h}\n", "2: save.<<: unknown key"),
        (
            "save:\n  on: [SIGTERM]\n",
            "2: save.on: unknown key (known: every_n_steps, every_n_epochs, every, max_overhead, mtbf, on_signal",
        ),
        ("~: 1\n", "1: ~: unknown key"),
        # wrong types
        ("- 1\n", "1: the configuration must be a mapping of save, keep, write, restore, require_resume; got [1]"),
        ("just text\n", "1: the configuration must be a mapping of"),
        ("keep: 3\n", "1: keep: must be a mapping of last, best, every_n_steps, every, within, max_size, got 3"),
        ("keep:\n  last: three\n", "2: keep.last: must be a whole number, got 'three'"),
        ("keep:\n  last: 3.0\n", "2: keep.last: must be a whole number, got 3.0"),
        ("keep:\n  last: yes\n", "2: keep.last: must be a whole number, got true"),
        ("keep:\n  last: '3'\n", "2: keep.last: must be a whole number, got '3'"),
        ("keep:\n  best: val_loss\n", "2: keep.best: must look like {k: 2, monitor: val_loss, mode: min}, got 'val_l"),
        ("keep:\n  best: {k: 2}\n", "2: keep.best.monitor: must name a metric"),
        ("write:\n  durable: 1\n", "2: write.durable: must be true or false, got 1"),
        ("write:\n  durable: null\n", "2: write.durable: must be true or false, got null"),
        ("write:\n  share: true\n", "2: write.share: must be a whole number, got true"),
        ("require_resume: 'no'\n", "1: require_resume: must be true or false, got 'no'"),
        ("require_resume:\n", "1: require_resume: must be true or false, got null"),
        ("save:\n  on_signal: [TERM]\n", "2: save.on_signal[0]: this system has no signal 'TERM'; did you mean SIGTER"),
        ("save:\n  on_signal:\n  - SIGTERM\n  - SIGKILL\n", "4: save.on_signal[1]: SIGKILL cannot be handled"),
        (
            "save:\n  every: atuo\n",
            "2: save.every: must be auto, or a positive number and a unit such as 30min, got 'at",
        ),
        ("save:\n  every: auto\n  max_overhead: 1\n", "3: save.max_overhead: 1 has no unit; write 1%"),
        (
            "save:\n  every: auto\n  max_overhead: 1.5\n",
            "3: save.max_overhead: must be more than 0% and less than 100%",
        ),
        (
            "save:\n  every: auto\n  max_overhead: little\n",
            "3: save.max_overhead: must be a percentage such as 1% or 0",
        ),
        (
            "save:\n  every: auto\n  max_overhead: -1%\n",
            "3: save.max_overhead: must be a percentage such as 1% or 0.5%",
        ),
        ("save:\n  every: auto\n  mtbf: 12\n", "3: save.mtbf: 12 has no unit; write 12s, 12min, 12h or 12d"),
        ("save:\n  every: 1h\n  mtbf: 12h\n", "3: save.mtbf: has a meaning only for an interval that is measured"),
        # zero
        ("save:\n  every: auto\n  max_overhead: 0%\n", "3: save.max_overhead: 0 is refused"),
        ("keep:\n  last: 0\n", "2: keep.last: 0 is refused: frameworks disagree on its meaning"),
        ("keep:\n  max_size: 0GB\n", "2: keep.max_size: 0 is refused"),
        ("save:\n  every: 0min\n", "2: save.every: 0 is refused"),
        ("write:\n  share: 0\n", "2: write.share: 0 is refused: frameworks disagree on its meaning (none, unlimited, "),
        ("keep:\n  best: {monitor: x, k: 0}\n", "2: keep.best.k: 0 is refused"),
        # texts to choose from
        (
            "write:\n  mode: asinc\n",
            "2: write.mode: must be one of sync, async, lazy, got 'asinc'; did you mean async?",
        ),
        (
            "write:\n  mode: on\n",
            "2: write.mode: must be one of sync, async, lazy, got true (YAML reads on, off, yes and no",
        ),
        ("restore:\n  verify: befor\n", "2: restore.verify: must be one of stream, before, off, got 'befor'; did you"),
        ("restore:\n  verify: true\n", "2: restore.verify: must be one of stream, before, off, got true (YAML reads"),
        (
            "keep:\n  best:\n  - {monitor: loss}\n  - monitor: y\n    mode: maxx\n",
            "5: keep.best[1].mode: must be one of min, max, got 'maxx'; did you mean max?",
        ),
        # what YAML 1.1 makes of numbers and dates
        ("save:\n  every: 30\n", "2: save.every: 30 has no unit; write 30s, 30min, 30h or 30d"),
        ("save:\n  every: 1:30\n", "2: save.every: YAML reads '1:30' as a number to base 60; write 90min"),
        ("save:\n  every: 1:30.5\n", "2: save.every: YAML reads '1:30.5' as a number to base 60"),
        ("keep:\n  last: 010\n", "2: keep.last: YAML reads '010' as an octal number"),
        ("save:\n  every: 2026-03-01\n", "2: save.every: YAML reads '2026-03-01' as a timestamp"),
        ("save:\n  every: =\n", "2: save.every: YAML reads '=' as a value"),
        ("save:\n  every_n_steps: 1e3\n", "2: save.every_n_steps: must be a whole number, got '1e3'"),
        ("save:\n  every: .inf\n", "2: save.every: must be a duration such as 30min, got inf"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_with_line_and_key(refusal, content, message):
    assert refusal(content).startswith(f"run.yaml:{message}")


def test_zero_comes_with_the_way_out(refusal):
    assert refusal("keep:\n  last: 0\n").endswith("leave the rule out (null) to switch it off")
    assert refusal("write:\n  share: 0\n").endswith("write false to share nothing")


# What is refused: files


@pytest.mark.parametrize(
    "content, message",
    [
        ("keep:\n  last: 3\n  every: 1h\n  last: 4\n", "4: keep.last: duplicate key, first given in line 2"),
        ("keep:\n  last: 3\nkeep:\n  last: 4\n", "3: keep: duplicate key, first given in line 1"),
        ('keep:\n  last: 3\n  "last": 3\n', "3: keep.last: duplicate key"),
        ("keep:\n  last: [1\nsave:\n", "3: not valid YAML: while parsing a flow sequence, expected"),
        ("keep:\n\tlast: 3\n", "2: not valid YAML: "),
        ("keep: }\n", "1: not valid YAML: "),
        ("a: *nowhere\n", "1: not valid YAML: found undefined alias"),
        ("keep: {}\n---\nkeep: {}\n", "2: not valid YAML: expected a single document"),
        ("keep:\n  last: 3\n  every: \x00\n", "3: not valid YAML: "),
        ('keep:\n  within: "\\UFFFFFFFF"\n', "1: not valid YAML: "),
        (b"keep:\n  last: 3\n  # caf\xe9\n", "3: not UTF-8 (byte 0xe9)"),
        ("save: {}\n".encode("utf-16"), "1: not UTF-8"),
        ("? [a, b]\n: 1\n", "1: a key of this file must be plain text"),
        ("keep:\n  {a: b}: 1\n", "2: a key of keep must be plain text"),
        # tags
        ("keep: !!python/object/apply:os.system ['true']\n", "1: the YAML tag 'tag:yaml.org,2002:python/object/apply:"),
        ("keep:\n  last: !!int '3'\n", "2: the YAML tag 'tag:yaml.org,2002:int' is not accepted"),
        ("keep:\n  last: !thing 3\n", "2: the YAML tag '!thing' is not accepted"),
        ("keep: !!set {last}\n", "1: the YAML tag 'tag:yaml.org,2002:set'"),
        # bombs
        ("keep: &a [*a]\n", "1: aliases make this file too large"),
        ("keep: &a {last: *a}\n", "1: aliases make this file too large"),
        ("keep: &a\n  best: [*a]\n", "1: aliases make this file too large"),
        ("keep: " + "[" * 50 + "]" * 50 + "\n", "1: nested more than 16 levels deep"),
        ("keep: " + "[" * 30_000 + "\n", "1: nested more than 16 levels deep"),
        ("keep:\n  last: " + "9" * 5000 + "\n", "2: keep.last: "),
        ("keep:\n  last: 0x" + "f" * 9000 + "\n", "2: keep.last: is too large: a number of thousands of digits"),
    ],
)
def test_a_file_that_is_not_plain_yaml_is_refused_with_its_line(refusal, content, message):
    assert refusal(content).startswith(f"run.yaml:{message}")


@pytest.mark.parametrize(
    "content",
    [
        "keep: !!python/object/apply:os.mkdir [ran]\n",
        "keep: !!python/name:os.system\n",
        "save: !!python/module:os\n",
        "? !!python/object/new:os.mkdir [ran]\n: 1\n",
        "keep: !!binary gASVIQAAAAAAAACMBXBvc2l4\n",
        "keep: &a\n  <<: *a\n  last: 1\n",
        "keep:\n  \u202elast: 3\n",
        "keep: {max_size: 1e999GB}\n",
        "save: {every: 1e400h}\n",
        "save: {every: auto, max_overhead: .nan}\n",
        'keep: {"\\e[2J": 1}\n',
        "keep: " + "[" * 100_000,
        "keep: {last: " + "9" * 1_000_000 + "}\n",
    ],
    ids=lambda content: repr(content[:30]),
)
def test_a_hostile_file_is_refused_and_commands_neither_a_program_nor_a_terminal(refusal, content):
    assert refusal(content).isprintable()


def test_aliases_that_multiply_are_stopped_before_they_fill_the_memory(refusal):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    assert "aliases make this file too large" in refusal("\n".join(levels))


def test_a_file_that_cannot_be_a_configuration_is_not_read_to_its_end(refusal):
    assert refusal("# x\n" * 100_000) == "run.yaml: larger than 64 KiB: is this a configuration file?"


def test_a_missing_file_is_refused_with_the_folder_that_was_searched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^nowhere\.yaml: cannot read the configuration: No such file") as caught:
        Config.from_yaml("nowhere.yaml")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("path", [".", "a\0b"])
def test_a_path_that_is_no_file_is_refused(path):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        Config.from_yaml(path)


FRAGMENTS = """save keep last best every monitor - [ ] { } , &a *a << !!int ' " \\ | > ? % @ # 3 0x 1:30 ~
    null on .nan 30min --- ... é \\UFFFFFFFF"""
yamlish = st.lists(
    st.sampled_from([*FRAGMENTS.split(), ": ", " ", "- ", "? ", "\n", "\n  ", "\n    ", "\t", "\x85", "\u2028"]),
    max_size=25,
).map("".join)


@settings(deadline=None, max_examples=250)
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | yamlish.map(str.encode)
)
def test_any_file_is_a_configuration_or_a_config_error_that_names_it(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    try:
        config = Config.from_yaml(path)
    except ConfigError as error:
        message = str(error)
    else:
        assert isinstance(config, Config)
        return
    assert message.startswith(f"{path}:")


# The same in Python


@pytest.mark.parametrize("mapping", [None, [], "keep", 3])
def test_from_mapping_takes_nothing_but_a_mapping(mapping):
    with pytest.raises(ConfigError, match="must be a mapping"):
        Config.from_mapping(mapping)


def test_from_mapping_leaves_the_mapping_as_it_was():
    mapping = {"keep": {"last": 3}, "require_resume": False}
    Config.from_mapping(mapping)
    assert mapping == {"keep": {"last": 3}, "require_resume": False}


@pytest.mark.parametrize(
    "mapping, message",
    [
        ({"keep": {"best": [{"monitor": "x", "mode": "?"}]}}, r"^keep\.best\[0\]\.mode: must be one of"),
        ({3: 4}, "^3: unknown key"),
        ({"keep": {None: 4}}, r"^keep\.None: unknown key"),
        ({"keep": {"last": [3]}}, r"^keep\.last: must be a whole number, got \[3\]"),
    ],
)
def test_from_mapping_names_the_key(mapping, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_mapping(mapping)


@pytest.mark.parametrize(
    "section, value", [("save", {"every": "1h"}), ("keep", None), ("write", SavePolicy()), ("restore", "off")]
)
def test_a_section_of_the_wrong_type_is_refused_by_name(section, value):
    with pytest.raises(ConfigError, match=rf"^{section}: must be a \w+Policy, got .*Config.from_mapping"):
        Config(**{section: value})


@pytest.mark.parametrize(
    "policy, key, value",
    [
        (WritePolicy, "mode", "fast"),
        (WritePolicy, "threads", 0),
        (WritePolicy, "threads", 1.5),
        (WritePolicy, "on_full", "delete"),
        (WritePolicy, "on_full", None),
        (WritePolicy, "durable", None),
        (WritePolicy, "share", 0),
        (WritePolicy, "share", -1),
        (WritePolicy, "share", None),
        (RestorePolicy, "verify", "never"),
        (RestorePolicy, "verify", None),
        (Config, "require_resume", 1),
    ],
)
def test_policies_built_in_python_are_checked_too(policy, key, value):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        policy(**{key: value})


def test_a_configuration_cannot_be_changed():
    config: Any = Config()
    with pytest.raises(AttributeError):
        config.require_resume = False
