"""The report of a quantized package: measured errors as data, as a table and as a picture.

Reads what calibration wrote; never imports what calibrates.
"""
