"""ComfyUI with the pack and the stand-ins, for a person: `make ui`."""

import sys
import time
from contextlib import suppress

from ..harness import comfy, environment, models

PORT = 8188


def main() -> None:
    base = environment.cache() / "work" / "ui"
    models.link_models(base / "models", models.format_standins(), models.shapesworld())
    port = int(sys.argv[1]) if len(sys.argv) > 1 else PORT
    with comfy.serve(base, port=port) as server, suppress(KeyboardInterrupt):
        print(f"Open {server.url} in a browser; the pictures go to {base / 'output'}. Ctrl-C ends it.")
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
