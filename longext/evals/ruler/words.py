"""Adjectives and nouns: `adjective-noun` keys for retrieval prompts, no two alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from longext.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

_ADJECTIVES = """
    able amber ancient angry arid autumn awake bald bitter blank bold brave brief bright brisk broad broken busy calm
    careful cheap cheerful civil clean clear clever cloudy coarse cold common cosy crisp crooked cruel curious curly
    damp daring dark dear deep dense distant dizzy double dreary dry dull dusty eager early earnest easy elder empty
    even faint fair false famous fancy fast fierce final fine firm flat fond formal fragile frank free fresh frosty full
    gentle giant glad golden grand grave great green grim hard harsh hasty heavy hidden high hollow honest huge humble
    icy idle inner jolly keen kind large late lazy lean level light little lively lone long loud low loyal lucky mad
    major mellow mild minor misty modest narrow neat new noble noisy northern odd old open outer pale patient plain
    plump polite poor proud pure quaint quick quiet rapid rare raw ready rich ripe robust rosy rough round royal rude
    rustic sad safe salty scarce secret serene severe shallow sharp shiny short shy silent silver simple sincere sleepy
    slender slim slow small smooth snowy sober soft solid sour southern spare stable stale steady steep stern stiff
    still strange strict strong stubborn sturdy subtle sudden sunny sweet swift tall tame tender thick thin thirsty tidy
    tight tiny tired tough tranquil true upper urban vague vast velvet vital vivid warm wary weary western wet wide wild
    windy wise witty wooden yellow young zealous"""
_NOUNS = """
    acorn anchor apple apron arch arrow axle badge bakery ballad banner barn basin basket beach beacon beak bell
    bench berry bishop blanket bonnet bottle boulder bowl branch brass bread brick bridge broom brush bucket butter
    button cabin cable cake canal candle canoe canyon captain carpet cart castle cave cedar cellar chain chair chalk
    chapel cherry chimney circle cliff clock cloth cloud clover coach coal coast coat coin comet copper coral cottage
    cotton cousin cradle crane crow crown crystal cup curtain dairy daisy dancer desert dial diamond doctor donkey dove
    dragon drawer drum duck eagle engine falcon farmer feather fence fern ferry fiddle field finger flag flame flute
    forest fork fountain fox frame garden garlic gate ghost giraffe glacier glove goat goose grape guitar hammer harbor
    harp hat hawk hedge helmet heron hill horn horse hotel island ivory jacket jar jewel judge jug kettle key kitchen
    kite knight knot ladder lake lamp lantern lark laurel leaf lemon letter library lily linen lion lock lodge magnet
    maple marble market mast meadow melon merchant mill mirror monk moon mountain mule museum nail needle nest oak oar
    ocean olive onion orchard organ otter oven owl paddle painter palace paper parrot path pear pebble pencil pepper
    piano pigeon pillow pilot pine plank planet plum pocket poet pond poplar porch potter prairie prince puppet quail
    quarry quill rabbit raft rail raven reef ribbon river robin rocket roof rope rose rudder saddle sailor salmon sand
    scarf school shell shepherd ship shoe shovel silk singer sparrow spider spoon spring squirrel stable star station
    statue stone stove stream sugar swan table tailor tavern teapot temple thimble thorn throne tiger timber torch tower
    train trumpet tulip tunnel turtle valley vase village violet violin wagon wall walnut walrus water weaver whale
    wheat wheel willow window wing winter wolf"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
NUM_NAMES = len(ADJECTIVES) * len(NOUNS)


def draw_name(rng: np.random.Generator) -> str:
    """Return a random `adjective-noun`."""
    return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"


def draw_different(draw: Callable[[], str], taken: set[str], most: int) -> str:
    """Return something drawn that is not `taken` yet, and take it.

    Args:
        most: how many different things there are to draw.

    Raises:
        ConfigError: nearly all of them are taken.
    """
    if len(taken) > 0.9 * most:
        raise ConfigError(f"There are {most:,} different keys of this kind, too few for this length: use uuids.")
    while (name := draw()) in taken:
        pass
    taken.add(name)
    return name
