"""easy-VQA for lm-eval; its YAML refers to the functions here."""
