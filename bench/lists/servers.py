"""Who takes part in bench/servers.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from bench.contestants import Contestant, Kind

MODES = ("sync", "async")
BARE = ("zmq-ipc", "zmq-tcp", "gloo")  # what times are compared with
REFERENCE = "one-device"
ONLY_ASYNCHRONOUS = "ParameterServerStrategy has no synchronous mode"
OURS, RPC, RAY, TENSORFLOW, ALONE = (
    f"bench.contestants.{name}" for name in ("ours_served", "rpc", "ray_ps", "tensorflow_dense", "alone")
)

# Our plans, as data: rules that put every variable on servers, spread by size.
PLANS = {mode: f"default: {{parameter_server: {{mode: {mode}, place: least_loaded}}}}" for mode in MODES}


@dataclass(frozen=True, slots=True)
class Setting:
    """mode: "sync" or "async"."""

    mode: str
    trainers: int
    servers: int

    def __str__(self) -> str:
        return f"{self.mode}, trainers {self.trainers}, servers {self.servers}"


def ours(name: str, setting: Setting, compile: bool | str) -> Contestant:
    return Contestant(
        name,
        Kind.OURS,
        OURS,
        {"plan": PLANS[setting.mode], "compile": compile, "shard": False},
        processes=setting.trainers,
        helpers=("store", *["server"] * setting.servers),
        wire={"tcp": True},
    )


def rpc(name: str, setting: Setting) -> Contestant:
    servers = ("server",) * setting.servers
    return Contestant(
        *(name, Kind.PEER, RPC, {"mode": setting.mode}, setting.trainers),
        helpers=servers,
        wire={"tcp": True},
        restless=True,  # a thread of TensorPipe's polls shared memory
    )


def ray(name: str, setting: Setting) -> Contestant:
    return Contestant(
        name,
        Kind.PEER,
        RAY,
        {"mode": setting.mode, "trainers": setting.trainers, "servers": setting.servers},
        processes=1,
        minibatches=setting.trainers,
        environment="ray",
        counted=False,
        restless=True,
    )


def tensorflow(name: str, setting: Setting) -> Contestant:
    return Contestant(
        name,
        Kind.PEER,
        TENSORFLOW,
        processes=1,
        minibatches=setting.trainers,
        helpers=("worker",) * setting.trainers + ("ps",) * setting.servers,
        environment="tensorflow",
        imports="tensorflow",
        unavailable=ONLY_ASYNCHRONOUS if setting.mode == "sync" else None,
    )


def bare(name: str, module: str, options: Mapping[str, object], setting: Setting) -> Contestant:
    servers = ("server",) * setting.servers
    return Contestant(name, Kind.LIMIT, f"bench.contestants.{module}", options, setting.trainers, helpers=servers)


def transfers(setting: Setting) -> dict[str, Contestant]:
    """Who pushes and pulls, and the bare round trips of the same bytes, which know no modes."""
    everyone = [
        bare("zmq-ipc", "raw_zmq", {"transport": "ipc"}, setting),
        bare("zmq-tcp", "raw_zmq", {"transport": "tcp"}, setting),
        bare("gloo", "raw_gloo", {}, setting),
        ours("syncwright", setting, compile="auto"),
        rpc("torch-rpc", setting),
        ray("ray", setting),
        tensorflow("tensorflow-ps", setting),
    ]
    return {contestant.name: contestant for contestant in everyone}


def trainings(trainers: int, servers: int) -> dict[str, Contestant]:
    """Who trains a model over servers, in each mode; and what one device does, which is the limit."""
    everyone = [
        Contestant("alone", Kind.APART, ALONE, processes=1),
        Contestant(REFERENCE, Kind.WHOLE, ALONE, {"trainers": trainers}, processes=1, minibatches=trainers),
    ]
    for mode in MODES:
        setting = Setting(mode, trainers, servers)
        of_mode = [
            ours(f"syncwright-{mode}", setting, compile="auto"),
            rpc(f"torch-rpc-{mode}", setting),
            ray(f"ray-{mode}", setting),
            tensorflow(f"tensorflow-ps-{mode}", setting),
        ]
        everyone += [replace(one, loss_reference=REFERENCE) for one in of_mode] if mode == "sync" else of_mode
    return {contestant.name: contestant for contestant in everyone}
