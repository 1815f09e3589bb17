"""What every refusal must be."""


def assert_one_sentence(error):
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and ". " not in text
