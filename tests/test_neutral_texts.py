"""The packaged neutral texts: enough of them in each language, as long as they should be, and about no group."""

import re

import pytest

from kbne_edit.evaluation.neutral import packaged

# Words that would make a text speak of people as members of a group. English ones also cover occupations with a gender.
PEOPLE = {
    "en": r"\b(wom[ae]n|m[ae]n|girls?|boys?|people|persons?|he|she|his|hers?|mothers?|fathers?|gay|lesbian|old people|"
    r"muslims?|christians?|jew\w*|hindus?|immigrants?|nurses?|doctors?|engineers?|race|religion|gender|nation\w*)\b",
    "de": r"\b(frau\w*|m[äa]nn(er)?|mädchen|junge[nr]?|leute|menschen?|mütter|mutter|väter|vater|schwul\w*|muslim\w*|"
    r"christ\w*|jud\w*|jüd\w*|ausländ\w*|türk\w*|ärzt\w*|arzt|religion\w*|geschlecht\w*|nation\w*)\b",
    "es": r"\b(mujer\w*|hombres?|niñ[ao]s?|gente|personas?|madres?|padres?|gay|musulm\w*|cristian\w*|judí\w*|gitan\w*|"
    r"inmigrant\w*|médic\w*|religi\w*|género|nacion\w*|raza)\b",
    "fr": r"\b(femmes?|hommes?|filles?|garçons?|gens|personnes|mères?|pères?|gay|musulm\w*|chrétien\w*|juif\w*|juiv\w*|"
    r"roms?|immigré\w*|médecins?|religi\w*|genre|nation\w*|race)\b",
    "zh": r"女|男|人们|母亲|父亲|孩子|民族|宗教|穆斯林|基督|同性|户口|外地|农民|医生|护士",
}


@pytest.mark.parametrize("language", PEOPLE)
def test_texts_are_many_different_and_of_moderate_length(language):
    texts = packaged(language)
    assert len(set(texts)) == len(texts) >= 64
    openings = {text[:3] if language == "zh" else " ".join(text.split()[:2]) for text in texts}
    assert len(openings) >= 0.75 * len(texts)
    for text in texts:
        length = len(text) if language == "zh" else len(text.split())
        assert (45 if language == "zh" else 25) <= length <= (90 if language == "zh" else 60), text
        assert text[-1] in ".。" and "  " not in text


@pytest.mark.parametrize("language", PEOPLE)
def test_texts_speak_of_no_group(language):
    texts = packaged(language)
    assert [(text, word) for text in texts for word in re.findall(PEOPLE[language], text.casefold())] == []


@pytest.mark.parametrize("language", ["xx", "", "../neutral/en", "/tmp/en", "en/../de", "e\0n"])
def test_a_language_without_texts_has_none(language):
    assert packaged(language) == ()
