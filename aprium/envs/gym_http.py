"""Requests to servers of environments: JSON there and back, cookies kept, size and time bounded.

Nothing stays open between two requests, since an episode that meets a limit is not told to close.
"""

import asyncio
import functools
import json
import ssl
from collections.abc import Mapping
from typing import Any

import httpx2

from aprium.base.errors import EngineError, TaskError

_MAX_BYTES = 64 << 20
_BUSY = (429, 503)  # not taken in: to be asked again
_TRIES = 4
_LONGEST_WAIT_S = 10.0


@functools.cache
def _tls() -> ssl.SSLContext:
    """Return what certificates are trusted, which takes long to read."""
    return ssl.create_default_context()


class HttpSession:
    """One session with the server at `url`: what it sets as cookies is sent back to it.

    A request takes at most `timeout_s`, waiting for a busy server included. Failures are raised as
    `failure`. `key` is the server's.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 60.0,
        key: str | None = None,
        failure: type[TaskError] | type[EngineError] = TaskError,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise failure(f"{url!r} is no address: write it as http://HOST:PORT")
        self._timeout_s, self._failure, self._transport = timeout_s, failure, transport
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._cookies = httpx2.Cookies()

    async def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """Post JSON and return the JSON that comes; whatever is not well raises."""
        status, text = await self.post(path, body)
        where = f"{self.url}{path}"
        if not 200 <= status < 300:
            raise self._failure(f"{where} answers {status}: {text[:300]}")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._failure(f"{where} answers with no JSON: {text[:100]!r}") from error

    async def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        """Post JSON and return status and text; raises where there is no answer in time."""
        where = f"{self.url}{path}"
        try:
            async with asyncio.timeout(self._timeout_s):
                for attempt in range(_TRIES):
                    status, text, wait_s = await self._post(path, body)
                    if status not in _BUSY or attempt == _TRIES - 1:
                        break
                    await asyncio.sleep(2.0**attempt / 2 if wait_s is None else wait_s)
                return status, text
        except TimeoutError as error:
            raise self._failure(f"{where} did not answer in {self._timeout_s:g} s") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise self._failure(f"{where} does not answer: {error!r}") from error
        except ValueError as error:
            raise self._failure(f"{where} cannot be asked: {error}") from error

    async def _post(self, path: str, body: Mapping[str, Any]) -> tuple[int, str, float | None]:
        async with (
            httpx2.AsyncClient(
                base_url=self.url,
                headers=self._headers,
                cookies=self._cookies,
                timeout=None,  # there is one for the whole
                transport=self._transport,
                verify=_tls() if self.url.startswith("https") else False,
            ) as client,
            client.stream("POST", path, json=body) as response,
        ):
            data = bytearray()
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > _MAX_BYTES:
                    raise ValueError(f"the answer is larger than {_MAX_BYTES >> 20} MiB")
            self._cookies = client.cookies
            return response.status_code, data.decode(errors="replace"), _wait_s(response.headers)


def _wait_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a busy server asks for, within reason."""
    try:
        return min(max(float(headers.get("retry-after", "")), 0.0), _LONGEST_WAIT_S)
    except ValueError:
        return None
