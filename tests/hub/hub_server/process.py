"""Start the server, and let tests inject faults and read what the server received."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from huggingface_hub import constants, hf_api
from transformers.utils import hub as transformers_hub

from .store import USERS


class HubServer:
    """The server process; its methods are for tests."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("server.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.url, self.storage_url = self._process.stdout.readline().split()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate("")  # the server exits when its input ends
        assert self._process.returncode == 0

    def _ask(self, name: str, **request: Any) -> Any:
        call = urllib.request.Request(f"{self.url}/_control/{name}", json.dumps(request).encode(), method="POST")
        with urllib.request.urlopen(call, timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    @contextlib.contextmanager
    def fault(self, method: str, path: str, action: int | str, times: int = 1) -> Iterator[None]:
        """Inject a fault (see store.Fault) inside the block; fail if it did not happen. Then remove all faults."""
        self._ask("fault", method=method, path=path, action=action, times=times)
        try:
            yield
        finally:
            left = self._ask("clear")
        assert left[0] < times, "the fault never came"

    def requests(self) -> list[list[Any]]:
        """Return [origin, method, path, whether it had an Authorization header] for every request since the start."""
        return self._ask("requests")

    def places_of(self, text: str) -> list[str]:
        """Return where a text occurs in requests and stored files, except in Authorization headers to the Hub."""
        return self._ask("places", text=text)

    def repo(self, repo_id: str, revision: str = "main") -> dict[str, Any]:
        """Return `files` (path -> SHA-256), `titles` (newest first), `tags` and `branches` (name -> commit)."""
        return self._ask("repo", id=repo_id, revision=revision)


ALICE, ALICE_READS, BOB = USERS


class HubClient:
    """Makes huggingface_hub in this process use the server; nothing else of it is changed.

    `use_token`, `empty_caches`, `offline` and `lose_server` apply to the next calls. The methods of HubServer are
    available too.
    """

    def __init__(self, server: HubServer, home: Path, patch: Any) -> None:
        from hf_skiprnn.hub import upload as hub

        self.server, self._home, self._patch, self._caches = server, home, patch, 0
        for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET"):
            patch.setattr(constants, name, name == "HF_HUB_DISABLE_XET")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(hub, "WAIT", 0.0)
        self._point_to(server.url)
        self.empty_caches()
        self.use_token(ALICE)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.server, name)

    def _point_to(self, url: str) -> None:
        self._patch.setattr(constants, "ENDPOINT", url)
        self._patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        self._patch.setattr(hf_api.api, "endpoint", url)
        self._patch.setattr(transformers_hub, "_hf_api", None)

    def use_token(self, token: str | None) -> None:
        if token is None:
            self._patch.delenv("HF_TOKEN", raising=False)
        else:
            self._patch.setenv("HF_TOKEN", token)

    def empty_caches(self) -> None:
        self._caches += 1
        self._patch.setattr(constants, "HF_HUB_CACHE", str(self._home / f"hub-{self._caches}"))

    def offline(self) -> None:
        self._patch.setattr(constants, "HF_HUB_OFFLINE", True)

    def lose_server(self) -> None:
        """Connect to a port where no server listens."""
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            self._point_to(f"http://127.0.0.1:{unused.getsockname()[1]}")

    def environment(self) -> dict[str, str]:
        """Return the environment for a new process that uses the server as this one does."""
        own = {"HF_ENDPOINT": self.server.url, "HF_HOME": str(self._home), "HF_HUB_DISABLE_XET": "1"}
        return {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | own
