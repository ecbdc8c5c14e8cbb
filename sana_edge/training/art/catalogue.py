"""The kinds of objects: names, other names, and whether colour words suit them.

Names follow the labels and tags of emojibase-data 17; each kind is one picture of the art, found by its code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

_TABLE = """
animals:
fox 1f98a
dog 1f436 puppy
cat 1f431 kitten, kitty
rabbit 1f430 bunny
bear 1f43b
panda 1f43c
koala 1f428
tiger 1f42f
lion 1f981
cow 1f42e
pig 1f437 piglet
frog 1f438
monkey 1f435
chick 1f424 baby chicken
penguin 1f427
owl 1f989
duck 1f986
swan 1f9a2
parrot 1f99c
flamingo 1f9a9
elephant 1f418
giraffe 1f992
zebra 1f993
horse 1f40e
unicorn 1f984
camel 1f42a
sheep/sheep 1f411 lamb
hedgehog 1f994
turtle 1f422 tortoise
snail 1f40c
crab* 1f980
octopus/octopuses* 1f419
whale 1f433
dolphin 1f42c
fish/fish 1f420 tropical fish
shark 1f988
butterfly/butterflies* 1f98b
bee 1f41d honeybee
ladybug* 1f41e ladybird
dinosaur* 1f995 brontosaurus
dragon* 1f409
plants:
rose* 1f339
tulip* 1f337
sunflower 1f33b
tree 1f333 leafy tree
fir tree 1f332 evergreen, pine tree
palm tree 1f334 palm
cactus/cacti 1f335
mushroom* 1f344 toadstool
clover 1f340 four leaf clover
cherry blossom 1f338
food:
apple* 1f34e
banana 1f34c
lemon 1f34b
strawberry/strawberries 1f353
cherry/cherries 1f352
pear 1f350
pineapple 1f34d
watermelon 1f349 slice of watermelon
avocado/avocados 1f951
tomato/tomatoes 1f345
carrot 1f955
eggplant 1f346 aubergine
pumpkin 1f383 jack-o-lantern
bread/loaves of bread 1f35e loaf of bread
croissant 1f950
cheese/pieces of cheese 1f9c0 piece of cheese
hamburger 1f354 burger
pizza 1f355 slice of pizza
hot dog 1f32d
donut 1f369 doughnut
cookie 1f36a biscuit
cupcake* 1f9c1 muffin
birthday cake 1f382
ice cream 1f366 soft ice cream
lollipop 1f36d
coffee/cups of coffee 2615 cup of coffee, hot drink
teapot 1fad6
vehicles:
car* 1f697 automobile
bus/buses 1f68c coach
taxi 1f695 cab
fire truck 1f692 fire engine
ambulance 1f691
tractor* 1f69c
truck* 1f6fb pickup truck, pickup
motorcycle* 1f3cd motorbike
scooter* 1f6f5 motor scooter
bicycle* 1f6b2 bike
airplane 2708 aeroplane, plane
helicopter* 1f681
rocket* 1f680 spaceship
sailboat 26f5 sailing boat
ship 1f6a2
flying saucer 1f6f8 ufo
buildings:
house 1f3e0 home
castle 1f3f0
church/churches 26ea chapel
tent* 26fa
circus tent* 1f3aa
sky:
sun 1f31e
moon 1f319 crescent moon
star* 2b50
cloud 2601
rainbow 1f308
snowman/snowmen 26c4
planet 1fa90 ringed planet
things:
balloon* 1f388
gift* 1f381 present
teddy bear 1f9f8 teddy
kite 1fa81
soccer ball 26bd football
basketball 1f3c0
trophy/trophies 1f3c6 golden cup
guitar* 1f3b8
crown 1f451
top hat 1f3a9
cap* 1f9e2 baseball cap
shirt* 1f455 t-shirt
dress/dresses* 1f457 gown
backpack* 1f392 rucksack
umbrella* 2602
book* 1f4d5
light bulb 1f4a1 bulb
candle 1f56f
alarm clock* 23f0 clock
camera 1f4f7
laptop 1f4bb computer
key 1f511
heart* 2764
gem* 1f48e gemstone, diamond
robot 1f916
ghost 1f47b
anchor 2693
"""


@dataclass(frozen=True)
class Kind:
    """One kind: its picture's `code` (hexadecimal), and whether it is drawn in named colours."""

    name: str
    plural: str
    code: str
    group: str
    others: tuple[str, ...]
    coloured: bool

    @property
    def emoji(self) -> str:
        return chr(int(self.code, 16))


@lru_cache(maxsize=1)
def kinds() -> dict[str, Kind]:
    """All kinds by name. In the table: name[/plural][*] code [other names]; a star means named colours."""
    found: dict[str, Kind] = {}
    group = ""
    for line in _TABLE.strip().splitlines():
        if line.endswith(":"):
            group = line[:-1]
            continue
        words = line.split()
        at = next(i for i, word in enumerate(words) if _is_code(word))
        name, coloured = " ".join(words[:at]).removesuffix("*"), words[at - 1].endswith("*")
        name, _, plural = name.partition("/")
        others = tuple(o.strip() for o in " ".join(words[at + 1 :]).split(",") if o.strip())
        found[name] = Kind(name, plural or plural_of(name), words[at], group, others, coloured)
    return found


def plural_of(name: str) -> str:
    """The regular plural; irregular ones stand in the table."""
    if name.endswith(("x", "ch", "sh", "s")):
        return name + "es"
    return name[:-1] + "ies" if name.endswith("y") and name[-2] not in "aeiou" else name + "s"


def _is_code(word: str) -> bool:
    return len(word) in (4, 5) and word[0] in "12" and all(c in "0123456789abcdef" for c in word)
