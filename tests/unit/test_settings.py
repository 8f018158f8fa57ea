"""Settings: defaults, and errors that name the variable."""

from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.settings import Settings


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.load({}) == Settings()


def test_an_empty_variable_counts_as_unset() -> None:
    assert Settings.load({"HEARTMULA_PORT": "", "PATH": "/bin"}).port == 8000


def test_values_are_read() -> None:
    settings = Settings.load(
        {
            "HEARTMULA_SEQUENTIAL_OFFLOAD": "false",
            "HEARTMULA_HYBRID_MODE": "1",
            "HEARTMULA_MODEL_DTYPE": "bfloat16",
            "HEARTMULA_OUTPUT_PATH": "out",
            "HEARTMULA_DEVICE": "cuda:1",
        }
    )
    assert (settings.sequential_offload, settings.hybrid_mode) == (False, True)
    assert (settings.model_dtype, settings.output_path, settings.device) == ("bfloat16", Path("out"), "cuda:1")


@pytest.mark.parametrize(
    ("value", "read"), [("", None), ("auto", None), ("AUTO", None), ("true", True), ("1", True), ("no", False)]
)
def test_offload_is_decided_by_memory_unless_it_is_set(value: str, read: bool | None) -> None:
    assert Settings.load({"HEARTMULA_SEQUENTIAL_OFFLOAD": value}).sequential_offload is read


@pytest.mark.parametrize(
    ("variable", "value", "hint"),
    [
        ("HEARTMULA_PORT", "eighty", "whole number"),
        ("HEARTMULA_PORT", "70000", "65535"),
        ("HEARTMULA_MODEL_DTYPE", "int8", "float16, bfloat16, float32"),
        ("HEARTMULA_SEQUENTIAL_OFFLOAD", "maybe", "auto, true or false"),
        ("HEARTMULA_DEVICE", "gpu", "cuda:N"),
        ("HEARTMULA_NATS_URL", "localhost:4222", "nats://"),
        ("HEARTMULA_TURN_SECONDS", "nan", "seconds"),
        ("HEARTMULA_GPU_ID", "a.b", "letters"),
        ("HEARTMULA_PROT", "8000", "not a setting"),
        ("HEARTMULA_S3_ENDPOINT", "http://localhost:9000", "HEARTMULA_S3_ACCESS_KEY"),
    ],
)
def test_a_wrong_value_names_the_variable_and_what_it_may_be(variable: str, value: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.load({variable: value})
    assert variable in str(caught.value)
    assert hint in str(caught.value)


SECRETS = {
    "HEARTMULA_NATS_URL": "nats://gateway:hush-1@one:4222,tls://gateway:hush-2@two:4222",
    "HEARTMULA_S3_ENDPOINT": "http://localhost:9000",
    "HEARTMULA_S3_ACCESS_KEY": "reader",
    "HEARTMULA_S3_SECRET_KEY": "hush-3",
    "HEARTMULA_WEBHOOK_SECRET": "whsec_" + "aHVzaC00" * 4,
}


def test_settings_in_a_log_or_a_traceback_hold_no_secret() -> None:
    settings = Settings.load(SECRETS)
    for text in (repr(settings), str(settings), f"{settings!r}"):
        assert "8000" in text
        assert "hush" not in text
        assert "aHVzaC00" not in text


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HEARTMULA_NATS_URL", "gateway:hush@localhost:4222"),
        ("HEARTMULA_NATS_URL", "nats:/gateway:hush@localhost"),
        ("HEARTMULA_NATS_URL", "http://gateway:hush@localhost"),
        ("HEARTMULA_NATS_URL", "nats://gateway:hush#1@localhost:4222"),
        ("HEARTMULA_NATS_URL", "nats://gateway:hush/1@localhost:4222"),
        ("HEARTMULA_NATS_URL", "nats://gateway:pass@localhost:hush"),
        ("HEARTMULA_NATS_URL", "nats://gateway:hush@[::1"),
        ("HEARTMULA_NATS_URL", "nats://gateway:hush@"),
        ("HEARTMULA_NATS_URL", "nats://one:4222,gateway:hush@two:4222"),
        ("HEARTMULA_S3_ENDPOINT", "reader:hush@localhost:9000"),
        ("HEARTMULA_S3_ENDPOINT", "http://reader:hush@localhost:9000"),
        ("HEARTMULA_WEBHOOK_SECRET", "hush"),
    ],
)
def test_a_wrong_value_that_may_hold_a_secret_is_not_repeated(variable: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.load({variable: value, "HEARTMULA_S3_ACCESS_KEY": "a", "HEARTMULA_S3_SECRET_KEY": "b"})
    assert variable in str(caught.value)
    assert "hush" not in str(caught.value)
    assert "://" in str(caught.value) or "whsec_" in str(caught.value)
