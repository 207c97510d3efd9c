"""Settings that change speed but not results beyond rounding: oneDNN products, depthwise gradients, malloc."""
