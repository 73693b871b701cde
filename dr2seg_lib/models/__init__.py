from . import policy, sampling, lora, parallel
