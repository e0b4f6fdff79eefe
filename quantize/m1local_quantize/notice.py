"""NOTICE: what must be said about a quantized checkpoint.

What it is: the text that travels with every checkpoint, as the licence of the Baichuan-M1 weights
asks of derivatives. What it is not: legal advice.
"""

NAME = "NOTICE"

TEXT = """\
This folder holds modified weights.

Source:    {source}
Modified:  quantised by m1local to the recipe "{recipe}"; the rows of lm_head were normalised.

If the source is a Baichuan-M1 model of Baichuan Intelligence, these weights are a derivative of
it and remain under its "Baichuan-M1-14B community licence agreement"
(Baichuan-M1-14B 模型社区许可协议), which is not an open-source licence: commercial use needs the
vendor's written permission (opensource.contact@baichuan-inc.com). Whoever passes the weights on
states their source, adds a copy of the agreement (it lies in the source repository) and keeps this
notice; a published derivative carries the words "Baichuan Inside".

Answers of a language model are no medical advice.
"""


def notice(*, source: str, recipe: str) -> str:
    """The NOTICE of a checkpoint made from `source` by `recipe`."""
    return TEXT.format(source=source, recipe=recipe)
