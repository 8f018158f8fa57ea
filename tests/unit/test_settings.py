"""Settings: defaults, and errors that name the variable."""

from dataclasses import fields
from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.settings import Settings

README = Path(__file__).parents[2] / "README.md"


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
    ("variable", "value", "hint"),
    [
        ("HEARTMULA_PORT", "eighty", "whole number"),
        ("HEARTMULA_PORT", "70000", "65535"),
        ("HEARTMULA_MODEL_DTYPE", "int8", "float16, bfloat16, float32"),
        ("HEARTMULA_SEQUENTIAL_OFFLOAD", "maybe", "true or false"),
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


def test_the_readme_documents_every_variable() -> None:
    text = README.read_text()
    missing = [item.metadata["variable"] for item in fields(Settings) if f"`{item.metadata['variable']}`" not in text]
    assert missing == []
