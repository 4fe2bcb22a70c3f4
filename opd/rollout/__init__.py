"""Generation: the driver that turns prompts into scored samples, and the engines that write the answers."""
