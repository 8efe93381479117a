"""What a record says of the machine: what its speed depends on, not whose it is."""

from __future__ import annotations

from typing import Any

_KEPT = ("machine", "system", "python_implementation", "python_version")
_KEPT_OF_CPU = ("brand_raw", "count", "flags", "hz_advertised_friendly", "l2_cache_size", "l3_cache_size")


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    """Called by pytest-benchmark before a run's JSON is written."""
    kept = {name: machine_info[name] for name in _KEPT}
    kept["cpu"] = {name: value for name, value in machine_info["cpu"].items() if name in _KEPT_OF_CPU}
    machine_info.clear()
    machine_info.update(kept)
