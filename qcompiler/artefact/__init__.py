"""Artefacts: compiled models saved as folders, without pickle; `compiled.save` and `qcompiler.load`.

    folder/manifest.json                versions, and the size and SHA-256 of every other file
           signature.json               the calling convention of the model
           report.json                  the outcome for every user of a weight, and the passes that ran
           derivations.json                how stored weights were computed from the model's
           stages/00_captured.qir …     the graph as captured and after each pass; the last one runs
           host.py                      the host module, to read and to compare with regenerated code
           weights.safetensors          or weights-00001-of-0000N.safetensors
           calibration.safetensors      if the model was calibrated

Loading executes nothing from an artefact: it parses and verifies the graph, and regenerates the host module.
"""
