"""All kinds of garments: {name: function that makes its pieces from a Look}."""

from bottoms import shorts, skirt, trousers
from sewing import Look
from tops import dress, hoodie, shirt, sweater, t_shirt

__all__ = ["GARMENTS", "Look"]

GARMENTS = {
    "t-shirt": t_shirt,
    "shirt": shirt,
    "sweater": sweater,
    "hoodie": hoodie,
    "dress": dress,
    "skirt": skirt,
    "trousers": trousers,
    "shorts": shorts,
    "jeans": trousers,  # only on request: they are held out of the base model's training
}
