"""Raw text to shards of tokens: reading, cleaning, duplicates, tokens (`tfkern[data]`).

    from tfkern.data.prepare import Recipe, prepare

    if __name__ == "__main__":  # the workers import the script
        done = prepare(Recipe(input="shakespeare.txt", output="out", tokenizer="characters"))
        print(done)

The steps are those of datatrove (Penedo et al. 2024) wherever it has them. They run as ranks: each
rank reads one file of the stage before it and writes its own, so that workers, machines and the
order in which they finish change nothing in the result.
"""

from tfkern.data.prepare.recipe import Recipe
from tfkern.data.prepare.report import draw, steps
from tfkern.data.prepare.run import prepare

__all__ = ["Recipe", "draw", "prepare", "steps"]
