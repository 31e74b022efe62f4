"""Saves the memory of embedder.pyx. Usage: python run.py IMAGE"""

import sys

import embedder

PAGES = 4096

if __name__ == "__main__":
    with open(sys.argv[1], "wb") as file:
        populated, saved, checksum = embedder.save_pages(file.fileno(), PAGES)
    print(f"{populated} of {PAGES} pages had data; the image holds {saved}; CRC-32C {checksum:08x}")
