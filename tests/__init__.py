from core.one_gpu import show_one_gpu

show_one_gpu([{}])  # as train.py does, before the first test file loads torch
