"""Start a server on the bundled model and ask it with the official OpenAI client.

pip install openai; python examples/serve.py
"""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import openai


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Poll the health route until it answers; raise if the server ends first."""
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the server ended with status {process.returncode}")


def main() -> None:
    """Serve pico, stream an answer, stop the server."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "aprium.cli", "serve", "pico", "--port", str(port)]
    process = subprocess.Popen(command)
    try:
        wait_until_ready(url, process)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            stream = client.chat.completions.create(
                model="pico",
                messages=[{"role": "user", "content": "Spell plum letter by letter."}],
                temperature=0,
                max_tokens=64,
                stream=True,
            )
            for chunk in stream:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
            print()
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
