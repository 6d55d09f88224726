"""The pictures of the quickstart: 32 groups of ten OpenMoji drawings, named as the `emoji` package names them.

Chosen by hand for being told apart at 40 pixels: no skin tones, genders or flags, no letters or arrows, one of every
set of look-alikes (one clock, one heart, one book). The group is the answer of the group-classification task.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

GROUPS: dict[str, str] = {
    "face": "face_with_tears_of_joy sleeping_face enraged_face nauseated_face exploding_head "
    "cowboy_hat_face partying_face clown_face face_with_medical_mask smiling_face_with_sunglasses",
    "fantasy figure": "ghost alien robot skull pile_of_poo jack-o-lantern ogre goblin alien_monster snowman",
    "animal face": "dog_face cat_face mouse_face rabbit_face fox panda lion pig_face frog cow_face",
    "wild animal": "elephant giraffe zebra kangaroo camel gorilla hedgehog llama rhinoceros sloth",
    "bird": "rooster eagle owl flamingo peacock parrot penguin swan turkey hatching_chick",
    "sea animal": "spouting_whale octopus shark blowfish tropical_fish crab lobster squid jellyfish seal",
    "reptile or insect": "turtle snake crocodile T-Rex butterfly honeybee lady_beetle snail spider scorpion",
    "plant": "cactus palm_tree evergreen_tree mushroom four_leaf_clover maple_leaf sunflower tulip rose cherry_blossom",
    "fruit": "red_apple banana grapes watermelon lemon pineapple strawberry cherries pear coconut",
    "vegetable": "carrot broccoli eggplant ear_of_corn cucumber tomato onion garlic avocado hot_pepper",
    "meal": "hamburger pizza hot_dog taco french_fries sushi spaghetti cooking pretzel cheese_wedge",
    "sweet": "doughnut cookie birthday_cake cupcake lollipop candy chocolate_bar soft_ice_cream honey_pot custard",
    "drink": "hot_beverage beer_mug wine_glass cocktail_glass tropical_drink bubble_tea glass_of_milk teapot mate beverage_box",
    "road vehicle": "automobile bus fire_engine ambulance tractor racing_car motorcycle bicycle kick_scooter locomotive",
    "aircraft or boat": "airplane helicopter rocket flying_saucer sailboat speedboat passenger_ship canoe parachute satellite",
    "building": "house castle church hospital factory tent stadium Tokyo_tower Statue_of_Liberty ferris_wheel",
    "weather": "sun crescent_moon star cloud_with_rain tornado snowflake rainbow comet fire droplet",
    "landscape": "volcano desert_island mount_fuji sunrise night_with_stars ringed_planet water_wave desert national_park fountain",
    "sport": "soccer_ball basketball american_football tennis bowling boxing_glove ice_skate badminton pool_8_ball skateboard",
    "instrument": "guitar violin trumpet saxophone drum accordion musical_keyboard banjo maracas microphone",
    "toy or game": "game_die teddy_bear joystick video_game puzzle_piece yo-yo bullseye balloon crystal_ball kite",
    "clothing": "t-shirt jeans dress necktie socks gloves scarf coat kimono bikini",
    "hat, shoe or bag": "top_hat crown graduation_cap billed_cap running_shoe high-heeled_shoe hiking_boot handbag backpack luggage",
    "accessory": "glasses ring crutch lipstick watch gem_stone folding_hand_fan ribbon umbrella safety_pin",
    "tool": "hammer wrench screwdriver axe carpentry_saw magnet ladder toolbox gear scissors",
    "electronics": "mobile_phone laptop television camera radio light_bulb flashlight battery printer floppy_disk",
    "science or medicine": "microscope telescope test_tube dna stethoscope syringe pill thermometer petri_dish adhesive_bandage",
    "stationery": "pencil crayon paintbrush books envelope scroll newspaper pushpin paperclip artist_palette",
    "household thing": "chair bed toilet bathtub door key candle window alarm_clock broom",
    "prize or money": "money_bag trophy sports_medal credit_card coin wrapped_gift rosette ticket receipt treasure_chest",
    "body part": "ear eye nose mouth foot flexed_biceps brain tooth bone anatomical_heart",
    "sign": "stop_sign no_entry radioactive recycling_symbol warning check_mark_button cross_mark peace_symbol yin_yang red_heart",
}


@dataclass(frozen=True)
class Subject:
    """One thing to draw: its place in the catalogue, name in words, group, and the character the font draws."""

    index: int
    name: str
    group: str
    character: str


@lru_cache(maxsize=1)
def subjects() -> tuple[Subject, ...]:
    """Every subject in catalogue order.

    Raises:
        ValueError: the `emoji` package is missing, or knows a name no longer.
    """
    try:
        import emoji
    except ImportError as error:
        raise ValueError(
            "the quickstart's names come from the `emoji` package, which is not installed: pip install 'vlm2vec[quickstart]'"
        ) from error
    by_name = {
        entry["en"].strip(":"): character
        for character, entry in emoji.EMOJI_DATA.items()
        if entry["status"] == emoji.STATUS["fully_qualified"]
    }
    catalogue = []
    for group, names in GROUPS.items():
        for name in names.split():
            if name not in by_name:
                raise ValueError(
                    f"emoji {emoji.__version__} has no emoji called {name!r}; expected one of its English "
                    "names: install emoji 2.15 or newer"
                )
            # The variation selector asks for colour; this font always draws in colour and has no glyph for it.
            catalogue.append(Subject(len(catalogue), name.replace("_", " "), group, by_name[name].replace("\ufe0f", "")))
    return tuple(catalogue)


def with_article(name: str) -> str:
    """`an octopus`, `a cat face`; plural and mass nouns stay bare (`grapes`, `french fries`)."""
    if name in _BARE:
        return name
    return ("an " if name[0].lower() in "aeiou" else "a ") + name


_BARE = frozenset(
    {
        "grapes",
        "cherries",
        "french fries",
        "sushi",
        "spaghetti",
        "cooking",
        "fire",
        "jeans",
        "socks",
        "gloves",
        "glasses",
        "books",
        "scissors",
        "dna",
        "maracas",
        "badminton",
        "tennis",
        "bowling",
        "bubble tea",
        "mate",
        "Tokyo tower",
        "Statue of Liberty",
        "mount fuji",
        "night with stars",
    }
)
