"""Ways through the two passes, each for some problems: which kernels, what is kept between."""
