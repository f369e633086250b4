"""Wait until so many nodes have joined the Ray cluster: python wait_for_nodes.py NODES."""

import sys
import time

import ray

MOST_SECONDS = 600


def main() -> None:
    """Return when they have; end with an error when they do not."""
    wanted, until = int(sys.argv[1]), time.monotonic() + MOST_SECONDS
    ray.init(address="auto", logging_level="warning")
    while (joined := sum(node["Alive"] for node in ray.nodes())) < wanted:
        if time.monotonic() > until:
            sys.exit(f"{joined} of {wanted} nodes joined the Ray cluster within {MOST_SECONDS} s")
        time.sleep(1)


if __name__ == "__main__":
    main()
