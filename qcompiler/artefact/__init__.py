"""Artefacts: a compiled model as a folder, without pickle; `compiled.save(folder)` and `qcompiler.load(folder)`.

    folder/manifest.json                what made it, every other file with its size and SHA-256
           signature.json               how the model is called
           report.json                  what became of every reader of weights, and the passes that ran
           derivations.json                how stored weights were computed from the model's
           stages/00_captured.qir …     the graph as captured and after each pass; the last one is what runs
           host.py                      the host module: to read, and to compare with what is generated anew
           weights.safetensors          or weights-00001-of-0000N.safetensors
           calibration.safetensors      where there was a calibration

Nothing in an artefact is executed: the graph is read, verified, and generates its host module again.
"""
