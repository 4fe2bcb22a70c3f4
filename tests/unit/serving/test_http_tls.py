"""An https server's certificate is verified, against the system's authorities or a file's."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from aiohttp import web

from opd.serving.addresses import addresses
from opd.serving.endpoint_pool import EndpointPool, PoolSettings
from opd.serving.http import HttpError

pytestmark = [pytest.mark.unit, pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")]


def certificate(folder: Path) -> tuple[Path, Path]:
    """Self-signed, for 127.0.0.1: (certificate, key)."""
    made = folder / "certificate.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-out", made[0], "-keyout", made[1]], check=True, capture_output=True)
    return made


def test_a_certificate_that_is_not_trusted_is_refused_at_once_and_one_in_the_file_is_accepted(tmp_path: Path) -> None:
    certificate_file, key_file = certificate(tmp_path)

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"authorized_with": request.headers["Authorization"]})

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/generate", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.01)
        await runner.setup()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate_file, key_file)
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        found = addresses(f"https://127.0.0.1:{runner.addresses[0][1]}/generate")
        trusting = EndpointPool(found, PoolSettings(api_key="secret", ca_file=str(certificate_file)))
        doubting = EndpointPool(found, PoolSettings(api_key="secret", deadline_s=60.0))
        try:
            assert await trusting.post("/generate", {}) == {"authorized_with": "Bearer secret"}
            with pytest.raises(HttpError, match="certificate") as refused:
                await asyncio.wait_for(doubting.post("/generate", {}), 5)
            assert not refused.value.retryable
        finally:
            await trusting.close()
            await doubting.close()
            await runner.cleanup()

    asyncio.run(run())
