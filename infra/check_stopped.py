"""Exit with 1 when a process of the local stack is still alive, naming it."""

from __future__ import annotations

import sys

from upvla.stack import load_site, processes


def main() -> int:
    left = processes.marked(load_site().home)
    for process in left:
        print(f"check_stopped: {processes.describe(process)} is still alive", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
