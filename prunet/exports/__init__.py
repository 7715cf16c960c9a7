"""Exports of a student for other programs: a stock folder, a single file, a folder for OpenVINO, and their cards."""
