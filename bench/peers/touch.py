"""Makes the host of a virtual machine back memory: maps so many GiB, touches every page, and exits.

Usage: touch.py GIB

Prints the seconds it took.
"""

import argparse
import mmap
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gib", type=float)
    pages = int(parser.parse_args().gib * 2**30) // mmap.PAGESIZE
    begun = time.perf_counter()
    with mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
        # Fewer faults; what one writes is a page all the same.
        mapped.madvise(mmap.MADV_HUGEPAGE)
        mapped[:: mmap.PAGESIZE] = bytes([1]) * pages
    print(f"{time.perf_counter() - begun:.2f}")


if __name__ == "__main__":
    main()
