"""Whether a text begins by declining to answer, in six languages: what models say instead of an answer.

Each line says ways to decline that begin a sentence, or a part of one behind a comma. "I can't see a dog" is an answer.
"""

from __future__ import annotations

import re

QUOTATION = r'"[^"\n]{1,100}"|“[^”\n]{1,100}”|„[^“”\n]{1,100}[“”]|«[^»\n]{1,100}»|「[^」\n]{1,100}」'
_BEGINNING_CHARS = 160

_I_AM = r"(?:i'm|i am)"
_SEEING = r"(?:\w+ )?(?:see|find|spot|count|read|make out|tell(?! you)|be (?:sure|certain)|say for)\b"
_YET = r"(?![^.!?\n]*\bbut (?:it|there|they|s?he|the)\b)"  # "I can't determine the breed, but it has long ears."
_UNSEEN = rf"(?! {_SEEING}(?! (?:the|this|your|any) (?:image|picture|photo))){_YET}"
_TELL = "provide|offer|give|assist|help|answer|comply|identify|describe|discuss|comment|judge|share|respond|speculate"
_ENGLISH = (
    r"(?:i'm|i am|we're|we are) (?:\w+ ){0,2}sorry|sorry, (?:but )?(?:i|we|this|that)\b",
    r"i apologi[sz]e|i regret (?:to|that)|my apologies|apologies, (?:but|i)",
    rf"(?:i|we) (?:\w+ )?(?:cannot|can't|can not|won't|will not)\b{_UNSEEN}",
    rf"{_I_AM} (?:\w+ )?(?:unable|not able) to\b{_UNSEEN}",
    rf"{_I_AM} (?:\w+ )?not (?:allowed|permitted|comfortable|authori[sz]ed|in a position|going to|designed|qualified)",
    rf"{_I_AM} (?:just |only )?an ai\b|{_I_AM} (?:programmed|designed) not",
    r"i(?:'m going to have to| must| have to|'ll have to)(?: \w+)? decline|i'd rather not|i refuse",
    r"i think it(?:'s| is) best not",
    rf"i (?:do not|don't) (?:{_TELL})\b",
    r"i (?:do not|don't) (?:have (?:the (?:cap)?ability|access|permission|enough)|feel (?:comfortable|able))",
    r"it(?:'s| is| would be) (?:not |in)(?:possible for me|appropriate (?:for me|to))|there is no way for me",
    r"(?:this|that) is something i can|(?:this|that)(?:'s| is) not something i",
    r"[^.!?,]{0,30}\b(?:is|be|goes|'s) against (?:my|our)\b|th(?:is|at) \w+ violates ",
    r"my (?:guidelines|policy|policies|rules|programming|training) (?:do|prevent|prohibit|forbid)",
    r"as an? (?:ai|artificial|(?:large )?(?:language|vision|visual))\b[^.,]{0,40}, i\b",
)
_GERMAN = (
    r"(?:es )?tut mir (?:\w+ )?leid|entschuldig(?:ung|en sie)?, \w|verzeihung, \w|ich entschuldige mich|ich bedauere?",
    r"(?:leider|bedauerlicherweise) (?:(?:kann|darf|bin|muss|habe) ich|ist es mir)|es ist mir (?:\w+ )?nicht",
    r"(?:ich (?:kann|darf|möchte|werde)|[^.!?,]{0,40}\b(?:kann|darf|möchte|werde) ich)\b"
    r"(?![^.!?]*\b(?:sehen|finden|lesen|zählen|genau|sicher)\b)(?![^.!?]*\bkeine?n? \w+ erkennen)"
    r"[^.!?]{0,60}\b(?:nichts?|kein\w*)\b",
    r"ich bin (?:\w+ )?nicht (?:in der lage|befugt|berechtigt)",
    r"als ki\b[^.,]{0,40} (?:kann|darf|habe|bin) ich",
)
_FRENCH = (
    r"je suis (?:\w+ )?(?:désolé|navré)e?|(?:désolé|navré)e?, (?:mais|je)|(?:excusez-moi|pardon), ",
    r"je (?:m'excuse|regrette|préfère ne pas|crains)|il (?:m'est impossible|ne m'est pas)",
    r"je ne (?:peux|puis|saurais|souhaite|dois)\b(?: \w+)? pas (?!voir|distinguer|lire)|je ne saurais",
    r"je ne suis pas (?:en mesure|autorisée?|capable)|je n'ai pas (?:la (?:possibilité|capacité)|le droit|accès)",
    r"en tant qu(?:e |')(?:ia|intelligence|modèle|assistant)[^.,]{0,40}, je",
)
_SPANISH = (
    r"lo (?:siento|lamento|sentimos)\b|lamento no|(?:disculp\w+|perd[oó]n), ",
    r"no p(?:uedo|odemos) (?!ver|distinguir|leer)|no me (?:es posible|est[aá] permitido)|prefiero no|me temo",
    r"no (?:estoy|soy) (?:autorizad[oa]|en condiciones|capaz)|no tengo (?:la capacidad|acceso|permi)",
    r"como (?:una? )?(?:ia|inteligencia|modelo|asistente)[^.,]{0,40}, no",
)
_CHINESE = (
    r"[很非常]*(?:抱歉|遗憾)[，,]|[对對]不起[，,]|不好意思[，,]|我[很非常]*(?:抱歉|遗憾)",
    r"作[为為][^。，]{0,16}[，,]我|我是[^。，]{0,8}(?:人工智能|ai)[^。，]{0,8}[，,][^。]{0,4}[无無]法",
    r"[^。，]{0,6}我(?:[无無][法权]|不能|不便|不方便|不可以|没有?(?:能力|办法)|拒绝)(?!看到|看清|确定)",
)
_JAPANESE = (
    r"申し訳|すみません(?:が|、)|ごめんなさい|残念ながら、[^。]{0,30}ません|ai[^。、]{0,8}として、",
    r"[^。]{0,20}(?:答え|手伝い|回答|説明|特定|対応|識別|提供)[^。、]{0,8}(?:できません|できない|られません|かね|控え)",
    r"私[はに][^。、]{0,30}できません",
)
_DECLINING = "|".join((*_ENGLISH, *_GERMAN, *_FRENCH, *_SPANISH, *_CHINESE, *_JAPANESE))
_BEFORE = r"^|[.!?;,。！？，]\s*|\b(?:but|so|that|afraid|unfortunately|malheureusement|lamentablemente) "
_REFUSAL = re.compile(rf"(?:{_BEFORE})(?:{_DECLINING})")


def is_refusal(text: str) -> bool:
    """Return whether a text begins by declining to answer; what it quotes, as from a sign, does not count."""
    beginning = re.sub(QUOTATION, "", text[:_BEGINNING_CHARS].replace("\u2019", "'")).casefold()
    return _REFUSAL.search(beginning.strip()) is not None
