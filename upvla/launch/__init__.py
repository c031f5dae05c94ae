"""Running anything long on Ray, and introducing the rooms to each other."""
