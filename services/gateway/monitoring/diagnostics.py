"""Diagnostics: sentences about all that keeps workers from making songs."""

from collections.abc import Sequence

from shared.schema.worker import Role, WorkerStatus

_WITHOUT: dict[Role, str] = {"tokenizer": "songs wait", "codec": "songs wait after their tokens"}


def diagnose(workers: Sequence[WorkerStatus]) -> list[str]:
    """Describe what is wrong with the workers: roles without a worker, and problems that workers report."""
    devices: dict[str, set[Role]] = {}
    for worker in workers:
        if worker.role in _WITHOUT:  # an encoder is where a codec is, and need not be
            devices.setdefault(worker.gpu.id, set()).add(worker.role)
    found = [
        sentence
        for role, consequence in _WITHOUT.items()
        for sentence in (
            _missing_somewhere(role, devices)
            if any(role in roles for roles in devices.values())
            else _missing_everywhere(role, devices, consequence)
        )
    ]
    ill = sorted((worker for worker in workers if worker.problem), key=lambda worker: worker.instance)
    return found + [f"{worker.role} worker {worker.instance} on {worker.gpu.id}: {worker.problem}" for worker in ill]


def _missing_everywhere(role: Role, devices: dict[str, set[Role]], consequence: str) -> list[str]:
    places = [f"on {device}" for device in sorted(devices)] or ["is running"]
    return [f"no {role} worker {place}: {consequence}" for place in places]


def _missing_somewhere(role: Role, devices: dict[str, set[Role]]) -> list[str]:
    # Roles may be meant to be apart, as they are in hybrid mode; not where another device has both.
    if not any(len(roles) == len(_WITHOUT) for roles in devices.values()):
        return []
    lacking = sorted(device for device, roles in devices.items() if role not in roles)
    return [f"no {role} worker on {device}: its songs need another device" for device in lacking]
