"""Runs the simulation of embedder.c and saves it. Usage: python run.py IMAGE"""

import sys

import embedder

PAGES = 8192

if __name__ == "__main__":
    with open(sys.argv[1], "wb") as file:
        figures = embedder.save_simulation(file.fileno(), PAGES)
    print(f"{figures['writes']} writes; {figures['image_bytes']} bytes; {figures['faults']} writes waited")
