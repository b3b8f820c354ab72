"""Words of other languages than English that name a side or mention writing, as captions have them.

They are only found, never exchanged: the picture of such a caption is not mirrored. That costs little, and a caption
that names the wrong side costs much, so words in doubt (French 'droit' is 'straight', too) are listed.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cache

# Patterns of whole words, in any case. Words that are English, too, are left out ('journal'), and so are those that
# `mirroring` lists ('logo').
SIDES = {
    "German": r"links\w* linke[mnrs]? rechts\w* rechte[mnrs]?",
    "French": r"gauch(?:e|er|ère)s? droit(?:e|ier|ière)?s?",
    "Spanish": r"izquierd[ao]s? derech[ao]s?",
    "Italian": r"sinistr[aeio] destr[aeio]",
    "Portuguese": r"esquerd[ao]s? direit[ao]s?",
    "Dutch": r"links\w* linker\w* rechts\w* rechter\w*",
    "Polish": r"lew(?:a|ą|e|ego|ej|emu|o|y|ych|ym|ymi) praw(?:a|ą|e|ego|ej|emu|o|y|ych|ym|ymi)",
    "Swedish": r"vänster\w* höger\w*",
    "Danish, Norwegian": r"venstre\w* højre\w* høyre\w*",
    "Czech": r"[vn]a?levo lev(?:á|é|ého|ém|ou|ý|ých|ým) [vn]a?pravo prav(?:á|é|ého|ém|ou|ý|ých|ým)",
    "Slovak": r"[vn]?a?ľavo ľav(?:á|é|ého|ej|om|ou|ú|ý|ých|ým) [vn]?a?pravo prav(?:ej|om|ú)",
    "Croatian, Slovenian": r"lijev\w* [nu]?l(?:ij)?evo [nu]?desn[aeiou]\w*",
    "Catalan": r"esquerr[ae]s? esquerrà dret[ae]?s? dretes",
    "Romanian": r"st[âî]ng\w* dreapt\w* drept\w*",
    "Hungarian": r"bal balra balról balo\w* bals\w* jobb jobbra jobbról jobbo\w* jobbs\w*",
    "Finnish": r"vas(?:en|em)\w* oike[ai]\w*",
    "Estonian": r"vasak\w* parem\w*",
    "Lithuanian": r"kair(?:ė|į|i|y)\w* dešin\w*",
    "Turkish": r"sol solda soldaki soldan solu solun\w* sola sağ\w*",
    "Vietnamese": r"trái phải",
    "Indonesian, Malay": r"kiri\w* kanan\w*",
    "Russian": r"слева влево налево лев(?:ая|о|ого|ое|ой|ом|ому|ую|ые|ый|ых|ым|ыми)"
    r" справа вправо направо прав(?:ая|о|ого|ое|ой|ом|ому|ую|ые|ый|ых|ым|ыми)",
    "Ukrainian": r"зліва вліво ліворуч лів(?:а|е|ий|их|им|ого|ої|ому|ою|у|і|ій) вправо праворуч"
    r" прав(?:а|е|ий|их|им|ої|ою|у|і|ій)",
    "Bulgarian, Serbian": r"вляво наляво ляв\w* лев[аеиоу] лијев\w* вдясно надясно десен десн\w* дясн\w*",
    "Persian": r"چپ راست",
}
WRITING = {
    "German": r"texte[ns]? wort(?:e|en|es)? wört\w+ schriftz\w+ (?:auf|be|hand|in|unter|über)?schrift(?:en)?"
    r" beschriftet\w* geschrieben\w* buchstaben? initialen zahl(?:en)? ziffern? nummern? wasserzeichen \w*namens?"
    r" titels? schild(?:er|ern)? zeitung(?:en)? kalendern? tastatur(?:en)? \w*uhr(?:en)? landkarten? kennzeichen",
    "French": r"textes? mots? lettres? lettrages? écrit(?:e|ure)?s? chiffres? numéros? nombres? filigranes? noms?"
    r" titres? légendes? panneaux? enseignes? journaux horloges? calendriers? claviers? immatriculation monogrammes?",
    "Spanish": r"textos? palabras? letras? letreros? rótulos? escrit[ao]s? escrituras? inscripci[oó]n(?:es)?"
    r" n[uú]meros? cifras? d[ií]gitos? logotipos? nombres? firmas? t[ií]tulos? lemas? cartel(?:es)? peri[oó]dicos?"
    r" reloj(?:es)? calendarios? teclados? matr[ií]culas? monogramas?",
    "Italian": r"test[io] parol[ae] letter[ae] scritt[aeio] scrittur[ae] iscrizion[ei] numer[io] cifr[ae] loghi"
    r" nom[ei] firm[ae] titol[io] insegn[ae] cartell[io] giornal[ei] orologio? calendario? tastier[ae] targ(?:a|he)"
    r" monogramm[ai] filigran[ae]",
    "Portuguese": r"textos? palavras? letras? letreiros? escrit[ao]s? escritas? inscriç(?:ão|ões) n[uú]meros?"
    r" d[ií]gitos? logotipos? nomes? assinaturas? t[ií]tulos? placas? cartaz(?:es)? jorna(?:l|is) rel[oó]gios?"
    r" calend[aá]rios? teclados? monogramas?",
    "Dutch": r"tekst(?:en)? woord(?:en)? geschreven (?:hand|op)?schrift(?:en)? belettering cijfers? getal(?:len)?"
    r" nummers? \w*na(?:am|men) handtekening(?:en)? titels? (?:naam|uithang|verkeers)bord(?:en)? krant(?:en)?"
    r" klok(?:ken)? kalenders? toetsenbord(?:en)? kentekens? watermerk(?:en)?",
    "Polish": r"tekst\w* słow(?:a|ach|ami|em|o) słów liter(?:a|ą|ach|ami|ę|om|y) napis\w* pism(?:a|em|o) pisan\w*"
    r" liczb\w* cyfr\w* numer(?:ami|em|ów|u|y) nazw\w* imi(?:ę|ona|enia) podpis\w* tytuł\w* hasł\w* gazet(?:a|ą|ę|y)"
    r" zegar\w* kalendarz\w* klawiatur\w* rejestracyjn\w*",
    "Swedish": r"texten ord orden bokst[aä]v\w* skriv\w+ skrift\w* siffr\w* nummer\w* namn\w* skylt\w* tidning\w*"
    r" klock\w*",
    "Danish, Norwegian": r"tekst\w* ord ordet ordene bogstav\w* bokstav\w* skrev\w* skrift\w* tallet nummer\w* navn\w*"
    r" skilt\w* avis avisen klokke\w*",
    "Czech": r"slov(?:a|o|y) písm\w* nápis\w* čísl\w* číslic\w* názv\w* název podpis\w* noviny hodiny",
    "Slovak": r"slová písm\w* nápis\w* čísl\w* názov",
    "Croatian, Slovenian": r"riječ\w* slovima natpis\w* napis\w* broj\w*",
    "Romanian": r"textul\w* scris\w* litere\w* cuv[âi]nt\w* cuvinte\w* num[ăe]r(?:e|ul|ele)? inscripți\w*",
    "Hungarian": r"szöveg\w* felirat\w* betű\w* szám\w* szó szavak írás\w* írott név",
    "Finnish": r"teksti\w* kirjai\w* kirjoit\w* sana sanat sanoja numero\w* nimi",
    "Turkish": r"yazı\w* harf\w* kelime\w* rakam\w* metin\w* tabela\w* sayı\w*",
    "Vietnamese": r"chữ số viết",
    "Indonesian, Malay": r"tulisan\w* bertuliskan tertulis huruf\w* kata teks angka nomor",
    "Russian": r"текст\w* слов(?:а|ами|ах|о|ом)? букв\w* надпис\w* написан\w* шрифт\w* цифр\w* числ[ао] номер\w*"
    r" логотип\w* имя имена назван\w* подпис\w* заголов\w* вывеск\w* плакат\w* газет\w* час(?:ами|ов|ы) календар\w*"
    r" клавиатур\w* табличк\w* лозунг\w* монограмм\w* рукопис\w*",
    "Ukrainian": r"літер\w* напис\w* число назв\w* імена підпис\w* вивіск\w* годинник\w*",
    "Bulgarian, Serbian": r"дум[аи] натпис\w* реч речи име лого вестник\w* новине часовник\w*",
    "Greek": r"κείμεν\w* λέξ\w* γράμμα\w* γραμμέν\w* επιγραφ\w* λογότυπ\w* αριθμ\w* όνομα υπογραφ\w* τίτλ\w*"
    r" πινακίδ\w* εφημερίδ\w* ρολ(?:όι|όγια)",
    "Hebrew": r"ה?טקסט\w* ה?מיל(?:ה|ים) ה?אות ה?אותיות ה?כתוב\w* ה?כיתוב ה?כתב ה?לוגו ה?מספר\w* ה?חתימה ה?שלט\w*"
    r" ה?עיתון ה?שעון",
    "Arabic": r"(?:ال|بال|و)?(?:نص|نصوص|اسم|أسماء|حرف|حروف|أحرف|رقم|أرقام|ساعة|شعار) \w*كلم(?:ة|ات) \w*كتابة"
    r" \w*مكتوب\w* \w*توقيع \w*عنوان \w*لافتة \w*جريدة \w*صحيفة",
    "Persian": r"متن کلمه\w* حرف حروف نوشته\w* شماره\w* لوگو\w* نام ساعت",
}
# Found within words, too: these scripts have no spaces, or their words have prefixes.
SIDES_WITHIN = {
    "Chinese, Japanese": r"左 右 ひだり みぎ ヒダリ ミギ",
    "Korean": r"왼 오른 좌측 우측 좌우",
    "Arabic": r"يسار يمين [أا]يسر [أا]يمن يسرى يمنى",
    "Urdu": r"بائیں دائیں",
    "Hebrew": r"שמאל ימין ימני",
    "Greek": r"αριστερ δεξ[ιί]",
    "Thai": r"ซ้าย ขวา",
    "Hindi": r"बाए बाय[ाी] बाईं दाए दाय[ाी] दाईं दाहिन",
}
WRITING_WITHIN = {
    "Chinese": r"(?<![十丁])字 文本 [标標][志誌语語题題] 商[标標] [写寫][着著] [书書][写寫法] [号號][码碼] 招牌"
    r" [报報][纸紙] [时時][钟鐘] [键鍵][盘盤] 日[历曆] 水印 [签簽]名 [车車]牌",
    "Japanese": r"ロゴ テキスト 名前 看板 新聞 時計 書[いか] 番号 署名 カレンダー キーボード",
    "Korean": r"글자 글씨 문자 텍스트 로고 숫자 번호 이름 간판 신문 시계 서명 한글 영문"
    r" 쓰여 쓰인 적혀 적힌 상표 키보드 달력",
    "Urdu": r"لکھ الفاظ",
    "Thai": r"ข้อความ ตัวอักษร ตัวหนังสือ คำว่า เขียน โลโก้ ตัวเลข หมายเลข ชื่อ ป้าย นาฬิกา หนังสือพิมพ์ ลายเซ็น",
    "Hindi": r"शब्द अक्षर लिख टेक्स्ट लोगो संख्या अंक नंबर नाम हस्ताक्षर घड़ी अखबार",
}
# 'links' and 'linker' are no sides in a caption with words that are English alone and none that are German or Dutch.
ENGLISH = "a and are chain chains cuff from has its the their these this with"
GERMAN_OR_DUTCH = (
    "auf aus das dem den der des ein eine einem einen einer im ist mit neben oben sich und unten unter von vor zu zum"
    " zur boven de een en het hij met naar naast onder op staat te van zijn zit"
)
WORD = re.compile(r"\w+")


def _pattern(table: Mapping[str, str]) -> re.Pattern[str]:
    return re.compile("|".join(" ".join(table.values()).split()), re.IGNORECASE)


WHOLE = {"side": _pattern(SIDES), "writing": _pattern(WRITING)}
WITHIN = {"side": _pattern(SIDES_WITHIN), "writing": _pattern(WRITING_WITHIN)}


def foreign_side(text: str) -> str | None:
    """A word of another language than English that names a side; None without."""
    words = WORD.findall(unicodedata.normalize("NFC", text))
    if _is_english(words):
        words = [word for word in words if not word.lower().startswith("link")]
    return _find("side", text, words)


def foreign_writing(text: str) -> str | None:
    """A word of another language than English that mentions writing; None without."""
    return _find("writing", text, WORD.findall(unicodedata.normalize("NFC", text)))


def _is_english(words: Iterable[str]) -> bool:
    small = {word.lower() for word in words}
    return not small.isdisjoint(ENGLISH.split()) and small.isdisjoint(GERMAN_OR_DUTCH.split())


def _find(kind: str, text: str, words: Iterable[str]) -> str | None:
    if whole := next((word for word in words if _is_listed(kind, word)), None):
        return whole
    within = None if text.isascii() else WITHIN[kind].search(unicodedata.normalize("NFC", text))
    return within[0] if within else None


@cache  # captions have few different words, and there are many patterns
def _is_listed(kind: str, word: str) -> bool:
    return WHOLE[kind].fullmatch(word) is not None
