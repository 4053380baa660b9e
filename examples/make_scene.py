"""Draw `scene.png`: the first scene of a split of its own that has a dog with a left neighbour.

python examples/make_scene.py
"""

from itertools import count
from pathlib import Path

from ipn_starter.emoji_scenes import Scene, draw


def main() -> None:
    """Write `scene.png` beside this file."""
    for number in count():
        scene = Scene.make("examples", number)
        dog = next((thing for thing in scene.things if thing.noun.name == "dog"), None)
        if dog and scene.at(dog.row, dog.column - 1):
            draw(scene).save(Path(__file__).with_name("scene.png"))
            return


if __name__ == "__main__":
    main()
