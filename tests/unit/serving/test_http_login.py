"""User and password in a server's address: sent, and in no message."""

from __future__ import annotations

import asyncio
import base64

import pytest
from aiohttp import web

from opd.serving.http import HttpError, JsonClient

pytestmark = pytest.mark.unit


def test_a_login_is_sent_and_no_message_shows_it() -> None:
    async def who(request: web.Request) -> web.Response:
        scheme, _, login = request.headers["Authorization"].partition(" ")
        return web.json_response([scheme, base64.b64decode(login).decode()])

    async def run() -> tuple[object, str, str]:
        app = web.Application()
        app.router.add_get("/who", who)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        client = JsonClient(f"http://me:p%40ss@127.0.0.1:{port}", retries=0)
        try:
            answer = await client.get("/who")
            with pytest.raises(HttpError) as missing:
                await client.get("/nothing")
        finally:
            await client.close()
            await runner.cleanup()
        return answer, client.base_url, str(missing.value)

    answer, shown, message = asyncio.run(run())
    assert answer == ["Basic", "me:p@ss"]
    assert shown.startswith("http://127.0.0.1:") and shown in message
    assert "me:" not in message and "ss@" not in message
