"""Decoders that are cut into bottom, trunk and top, emulators of trunks, and the merge of tuned parts."""
