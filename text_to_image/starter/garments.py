"""All kinds of garments by name: each makes the pieces of one, for a look."""

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
    "jeans": trousers,  # only when asked for: the base model has never seen them
}
