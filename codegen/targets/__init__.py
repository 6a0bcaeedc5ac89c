"""The targets of this distribution, one file each; `qcompiler.runtime.device` imports and thereby registers all."""
