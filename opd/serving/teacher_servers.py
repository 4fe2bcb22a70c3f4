"""The teacher's SGLang servers when the run starts them itself (--opd-teacher-serve): kept alive until its end."""

from __future__ import annotations

import json
import logging
import tempfile
import threading
from pathlib import Path

from opd.config.schema import Config
from opd.errors import EngineError
from opd.serving.command import ServerOptions
from opd.serving.hosts import Server, ServerHost

logger = logging.getLogger(__name__)

WATCH_SECONDS = 1.0


class TeacherServers:
    """Starts them on construction; ``close`` (or leaving a ``with`` block) stops them.

    One that dies is started again, up to --sglang-max-restarts times; who scores waits for it meanwhile, as for any
    teacher that is away.

    Raises:
        EngineError: one could not be started.
    """

    def __init__(self, config: Config, host: ServerHost) -> None:
        opd, rollout = config.opd, config.rollout
        self._timeout_s = rollout.sglang_server_timeout
        self._restarts_left = rollout.sglang_max_restarts
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None
        self._servers: list[Server] = []
        folder = Path(config.output.output_dir or tempfile.mkdtemp(prefix="opd-teacher-"))
        try:
            for number in range(opd.opd_teacher_num_gpus // opd.opd_teacher_num_gpus_per_engine):
                log_path = folder / f"sglang_teacher_{number}.log"
                options = teacher_options(config, number, host)
                self._servers.append(host.start(number, options, log_path=log_path, port=None))
        except EngineError:
            self.close()
            raise

    @property
    def url(self) -> str:
        """As --rm-url."""
        return ",".join(f"{server.url}/generate" for server in self._servers)

    def wait_ready(self) -> None:
        """Returns when all answer; watches them from then on.

        Raises:
            EngineError: one does not come up; the message carries the end of its log.
        """
        for server in self._servers:
            seconds = server.wait_ready(self._timeout_s)
            logger.info("the teacher's SGLang server %s is ready after %.1f s", server.url, seconds)
        self._watcher = threading.Thread(target=self._watch, name="teacher servers", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Safe to call twice."""
        self._ended.set()
        for server in self._servers:
            server.stop()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None

    def __enter__(self) -> TeacherServers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _watch(self) -> None:
        while not self._ended.wait(WATCH_SECONDS):
            for server in self._servers:
                if not server.alive() and not self._ended.is_set():
                    self._revive(server)

    def _revive(self, server: Server) -> None:
        if self._restarts_left == 0:
            return
        self._restarts_left -= 1
        logger.warning(
            "the teacher's SGLang server at %s has ended; it is started again (%d more times)",
            server.url,
            self._restarts_left,
        )
        try:
            server.restart()
            server.wait_ready(self._timeout_s)
        except EngineError as error:  # the run waits for its teacher, or stops, by --opd-teacher-wait
            if not self._ended.is_set():
                logger.warning("%s", error)


def teacher_options(config: Config, number: int, host: ServerHost) -> ServerOptions:
    """Of server ``number``. Its devices, where the host assigns none, are behind the training ranks' and rollout's."""
    opd, rollout = config.opd, config.rollout
    folder = Path(str(opd.opd_teacher_serve))
    taken = config.parallel.actor_num_gpus_per_node
    if rollout.rollout_engine == "sglang" and not config.launch.colocate:
        taken += rollout.rollout_num_gpus
    facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = opd.opd_teacher_num_gpus_per_engine
    return ServerOptions(
        model_path=str(folder),
        device="cuda" if host.on_gpus else "cpu",
        dtype="bfloat16" if host.on_gpus else "float32",
        context_length=int(facts.get("max_position_embeddings", ServerOptions.context_length)),
        max_running_requests=opd.opd_teacher_concurrency,
        mem_fraction_static=rollout.sglang_mem_fraction_static,
        tp_size=size,
        base_gpu_id=0 if host.assigns_devices else taken + number * size,
        trust_remote_code=config.output.trust_remote_code,
    )
