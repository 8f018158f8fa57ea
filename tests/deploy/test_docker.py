"""The container files, as far as they can be checked without an engine that runs them."""

import asyncio
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from minio import Minio

from deploy.local.servers.embedded import S3Server, free_port, s3_server
from deploy.store_setup import main, prepare

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
SECRET = re.compile(r"\$\{([A-Z0-9_]+):\?[^}]*}")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]
    return found


def test_the_dockerfile_is_sound() -> None:
    run = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), DOCKERFILE], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout


def test_the_context_holds_what_is_copied_and_no_secret() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE.read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()[:-1]}
    whole = {name for name in names if not any(name.startswith(f"{other}/") for other in names)}
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert all((ROOT / name).exists() for name in names)
    assert whole == {rule[1:] for rule in rules if rule.startswith("!")}
    assert rules.index("*") < min(rules.index(f"!{name}") for name in whole)
    assert "**/.env" in rules


def test_the_gateways_image_has_no_torch() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.MULTILINE)
    (gateway,) = (stage for stage in stages if "AS build-gateway" in stage)
    assert "torch" not in gateway
    assert "[worker]" not in gateway
    project = (ROOT / "pyproject.toml").read_text()
    assert "torch" not in project[project.index("dependencies = [") : project.index("]", project.index("dependencies"))]


def test_nothing_runs_as_root() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.MULTILINE)
    images = [stage for stage in stages if re.match(r"\S+ AS (gateway|worker)$", stage, re.MULTILINE)]
    assert len(images) == 2
    for image in images:
        assert re.findall(r"^USER (.*)$", image, re.MULTILINE) == ["10001:10001"]


def test_kernels_are_compiled_in_the_workers_image_once(services: dict[str, Any]) -> None:
    """It has what `missing_compiler` asks for, and keeps what was compiled on a volume that can be written to."""
    worker = DOCKERFILE.read_text().split("FROM runtime AS worker")[1]
    assert re.search(r"apt-get install .* gcc libc6-dev", worker)
    (cache,) = re.findall(r"TRITON_CACHE_DIR=(\S+)", worker)
    volume = str(Path(cache).parent)
    assert f"data:{volume}" in services["tokenizer"]["volumes"]
    pod = yaml.safe_load((DEPLOY / "kubernetes/base/worker.yaml").read_text().split("\n---")[0])["spec"]["template"]
    (tokenizer,) = (one for one in pod["spec"]["containers"] if one["name"] == "tokenizer")
    (mount,) = (mount for mount in tokenizer["volumeMounts"] if mount["mountPath"] == volume)
    assert not mount.get("readOnly")


def test_only_the_gateway_is_reached_from_outside_and_from_this_machine_alone(services: dict[str, Any]) -> None:
    assert {name: service["ports"] for name, service in services.items() if "ports" in service} == {
        "gateway": ["${HEARTMULA_BIND:-127.0.0.1}:${HEARTMULA_PORT:-8000}:8000"]
    }


def test_services_come_back_in_order_and_have_time_to_hand_songs_back(services: dict[str, Any]) -> None:
    once = {"setup", "store-setup"}
    for name, service in services.items():
        assert service["restart"] == ("no" if name in once else "unless-stopped"), name
        assert service["logging"]["options"]["max-size"]
        needs = service.get("depends_on", {})
        if name not in {"nats", "s3"} | once:
            assert {need: how["condition"] for need, how in needs.items()} == dict.fromkeys(
                once, "service_completed_successfully"
            )
            assert service["stop_grace_period"] == "30s"
        for need, how in needs.items():
            assert how["condition"] != "service_healthy" or "healthcheck" in services[need]


def test_the_two_workers_of_a_gpu_share_it_and_its_lock(services: dict[str, Any]) -> None:
    tokenizer, codec = services["tokenizer"], services["codec"]
    assert tokenizer["volumes"] == codec["volumes"]
    assert any(volume.endswith(":/srv/data") for volume in codec["volumes"])
    (device,) = codec["deploy"]["resources"]["reservations"]["devices"]
    assert tokenizer["deploy"] == codec["deploy"]
    assert (device["driver"], len(device["device_ids"])) == ("nvidia", 1)
    assert {name for name, service in services.items() if "deploy" in service} == {"tokenizer", "codec"}
    for role in ("tokenizer", "codec"):
        # One name for the CPU, or each takes the other's turn for another device's.
        assert services[f"{role}-cpu"]["environment"] == services[role]["environment"] | {"HEARTMULA_GPU_ID": "cpu"}
        assert (services[role]["profiles"], services[f"{role}-cpu"]["profiles"]) == (["gpu"], ["cpu"])


def test_each_service_comes_to_nats_in_its_own_role(services: dict[str, Any]) -> None:
    for name, role in {"setup": "bootstrap", "gateway": "gateway", "tokenizer": "tokenizer", "codec": "codec"}.items():
        environment = services[name]["environment"]
        assert environment["HEARTMULA_NATS_URL"].startswith(f"nats://{role}:${{NATS_{role.upper()}_PASSWORD:?")
        passwords = SECRET.findall(str(environment))
        assert [word for word in passwords if word.startswith("NATS_")] == [f"NATS_{role.upper()}_PASSWORD"]
        assert "S3_ROOT_PASSWORD" not in passwords


def test_mounted_files_are_there_and_images_pinned(services: dict[str, Any]) -> None:
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), source
        default = re.fullmatch(r"\$\{[A-Z0-9_]+:-(.*)}", service["image"])
        assert default, "an image that cannot be overridden"
        assert re.search(r":[\w.-]*\d[\w.-]*(@sha256:[0-9a-f]{64})?$", default[1])


def test_secrets_are_made_once_and_are_all_that_compose_asks_for(services: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "docker", tmp_path / "docker")
    command = [str(tmp_path / "docker" / "env.sh")]
    assert subprocess.run([*command, "tpu"], capture_output=True, check=False).returncode == 2
    subprocess.run([*command, "cpu"], check=True, capture_output=True)
    file = tmp_path / ".env"
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    made = dict(line.split("=", 1) for line in file.read_text().splitlines())
    assert (made["COMPOSE_PROFILES"], made["HEARTMULA_MODEL_PATH"]) == ("cpu", "ckpt/demo")
    asked = set(SECRET.findall((DEPLOY / "docker-compose.yml").read_text()))
    assert asked == {name for name in made if name.endswith(("PASSWORD", "SECRET"))}
    passwords = [made[name] for name in asked if name.endswith("PASSWORD")]
    assert len(set(passwords)) == len(passwords)
    assert all(re.fullmatch(r"p[0-9a-f]{40}", word) for word in passwords)  # a letter first: see nats.conf
    before = file.read_bytes()
    subprocess.run(command, check=True, capture_output=True)
    assert file.read_bytes() == before


def test_nats_reads_the_passwords_that_are_made(services: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "docker", tmp_path / "docker")
    subprocess.run([str(tmp_path / "docker" / "env.sh")], check=True, capture_output=True)
    made = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines())
    given = {name: SECRET.sub(lambda m: made[m[1]], value) for name, value in services["nats"]["environment"].items()}
    config = DEPLOY / "nats" / "nats.conf"
    nats_server = Path(sys.executable).with_name("nats-server")
    run = subprocess.run([nats_server, "-t", "-c", config], env=given, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


async def test_the_store_may_be_prepared_again(tmp_path: Path) -> None:
    """Checked on the test's own server. Users are left out, since only MinIO has them."""
    async with s3_server(tmp_path, free_port(S3Server.ports), "root", "secretsecret") as server:
        client = Minio(server.url.removeprefix("http://"), "root", "secretsecret", secure=False, region="us-east-1")
        for _ in range(2):
            prepare(client, "songs")
        config = client.get_bucket_lifecycle(bucket_name="songs")
        assert config is not None
        assert [rule.rule_filter.prefix for rule in config.rules if rule.rule_filter] == ["tokens/"]


async def test_a_store_that_makes_no_users_is_tried_again_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test's own server has no admin interface; MinIO's refuses requests for a moment after its start."""
    async with s3_server(tmp_path, free_port(S3Server.ports), "root", "secretsecret") as server:
        given = {"ENDPOINT": server.url, "ROOT_USER": "root", "ROOT_PASSWORD": "secretsecret"}
        for name, value in (given | {"SERVICE_PASSWORD": "p" * 20, "READER_PASSWORD": "q" * 20}).items():
            monkeypatch.setenv(f"S3_{name}", value)
        assert await asyncio.to_thread(main, 1.0) == 1
        assert f"{server.url} (S3_ENDPOINT) refuses the request" in capsys.readouterr().err


def test_secrets_stay_out_of_git() -> None:
    run = subprocess.run(
        ["git", "check-ignore", "deploy/.env", "deploy/.env.new"], cwd=ROOT, capture_output=True, check=False
    )
    assert run.stdout.split() == [b"deploy/.env", b"deploy/.env.new"]
