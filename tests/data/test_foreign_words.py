"""Captions in other languages: a word that names a side or mentions writing keeps its picture unmirrored."""

import unicodedata

import pytest

from data.mirroring import why_not_mirrored

SIDES = [
    ("Ein Hund links im Bild", "links"),
    ("Tasche auf der rechten Seite", "rechten"),
    ("ein Aufnäher, Rechtsbündig", "Rechtsbündig"),
    ("un chien à gauche", "gauche"),
    ("LA MANCHE DROITE", "DROITE"),
    ("un perro sentado a la izquierda", "izquierda"),
    ("el bolsillo derecho", "derecho"),
    ("un cane a sinistra", "sinistra"),
    ("la tasca destra", "destra"),
    ("o bolso esquerdo", "esquerdo"),
    ("um cão à direita", "direita"),
    ("de hond zit links van de stoel", "links"),
    ("broek met rechterzak", "rechterzak"),
    ("pies po lewej stronie", "lewej"),
    ("prawą ręką", "prawą"),
    ("en hund till vänster", "vänster"),
    ("pes vľavo", "vľavo"),
    ("džep na desnoj strani", "desnoj"),
    ("a la dreta", "dreta"),
    ("câine în stânga", "stânga"),
    ("zseb a bal oldalon", "bal"),
    ("tasku oikealla", "oikealla"),
    ("koer vasakul", "vasakul"),
    ("kišenė dešinėje", "dešinėje"),
    ("cebi sağda", "sağda"),
    ("túi bên trái", "trái"),
    ("saku di sebelah kiri", "kiri"),
    ("собака слева", "слева"),
    ("правый рукав", "правый"),
    ("кишеня ліворуч", "ліворуч"),
    ("狗在左边", "左"),
    ("右袖に模様", "右"),
    ("왼쪽 주머니", "왼"),
    ("الكلب على اليسار", "يسار"),
    ("כלב בצד ימין", "ימין"),
    ("ο σκύλος ΔΕΞΙΑ", "ΔΕΞΙ"),
    ("หมาอยู่ทางซ้าย", "ซ้าย"),
    ("कुत्ता बाएँ ओर", "बाए"),
]
WRITING = [
    ("ein Hemd mit Aufschrift", "Aufschrift"),
    ("drei weiße Buchstaben", "Buchstaben"),
    ("une chemise avec des lettres", "lettres"),
    ("una camisa con letras", "letras"),
    ("una maglia con una scritta", "scritta"),
    ("camisa com números", "números"),
    ("trui met opschrift", "opschrift"),
    ("koszulka z napisem", "napisem"),
    ("gömlekte yazı var", "yazı"),
    ("áo có chữ", "chữ"),
    ("póló felirattal", "felirattal"),
    ("рубашка с надписью", "надписью"),
    ("白いシャツに文字", "字"),
    ("印有商标的衬衫", "商标"),
    ("로고가 있는 셔츠", "로고"),
    ("قميص عليه شعار", "شعار"),
    ("μπλούζα με γράμματα", "γράμματα"),
    ("เสื้อมีข้อความ", "ข้อความ"),
    ("ein Halsband, „Bello“", "„Bello“"),
    ("シャツに「空」", "「空」"),
]
ENGLISH = [
    "A pair of cufflinks on a white background",
    "cuff links",
    "a bracelet of chain links",
    "The chain links of a fence",
    "a rectangular textile with a coarse texture, a tall literal recto",
    "a lion, a lewd praise",
    "a café façade, naïve and crème",
    "solid soles, a soldier's dress, a jobber at a ball, a moral balance, sanatorium, a vase, dextrous",
]
OTHERS = [
    "ein rechteckiger Tisch, aufrecht",  # 'rectangular'
    "собака и лев, это правда",  # 'lion', 'truth'
    "一个红色的十字架",  # 'a red cross'
    "小狗坐在草地上",
]


@pytest.mark.parametrize(("caption", "word"), SIDES + WRITING)
def test_a_side_or_writing_in_another_language_keeps_the_picture_unmirrored(caption, word):
    assert why_not_mirrored(caption) == word
    assert why_not_mirrored(unicodedata.normalize("NFD", caption))  # as macOS writes accents


@pytest.mark.parametrize("caption", ENGLISH + OTHERS)
def test_words_that_only_look_like_them_allow_mirroring(caption):
    assert why_not_mirrored(caption) is None


def test_links_is_a_side_in_a_german_caption_with_an_english_name():
    assert why_not_mirrored("The North Face Jacke, links eine Tasche") == "links"
    assert why_not_mirrored("a jacket with links of steel") is None
