"""What ``mend`` and ``malmen`` share: a network that reads a fact's gradient and says how weights change.

``network``   the network and its statistics; each method's own class says what a change is made of
``config``    the settings of training
``task``      one run of training: a fact in one wording changes the weights, another wording and other questions judge
``trainer``   facts in, editor out; how long that takes here
``editing``   an editor opened, gradients read, the patch made
"""
