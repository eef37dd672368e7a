"""One layer is scaled: what becomes of the loss?"""
