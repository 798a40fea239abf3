"""The machinery: nobody who trains a network has to open it, and nobody imports it but scripts, __main__ and tests."""

PRIVATE = {  # where a private name of Lightning is found (tests/test_private_names.py looks there): why it is needed
    "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop": "the lean loop is one",
    "lightning.pytorch.loops.fetchers._DataFetcher": "what gives the lean loop its batches, for the signatures only",
    "trainer.fit_loop.epoch_loop._results": "where self.log keeps what was logged; the lean loop tells it the batch",
    "trainer.fit_loop.epoch_loop._batches_that_stepped": "the step that loggers are told; the lean loop counts it",
    "trainer.fit_loop.epoch_loop._skip_next_val": "a validation not to be repeated after resuming",
    "trainer.fit_loop.epoch_loop._should_check_val_fx": "whether a validation follows: then nothing is saved yet",
    "trainer.fit_loop._data_fetcher": "what _should_check_val_fx takes",
    "trainer.fit_loop._restarting": "or a plateau schedule would miss the end of the epoch that is continued",
    "trainer._logger_connector": "what the lean loop tells of the beginning and the end of a step",
    "trainer._logger_connector._current_fx": "the hook that is logging; None afterwards, if nothing was logged",
    "module._current_fx_name": "the hook that self.log asks for",
    "trainer._signal_connector": "Lightning's own signal handlers, which would end a test in silence",
    "averaging._average_model": "the average of --ema, which is moved all tensors at once",
    "averaging._latest_update_step": "the step of the latest average, which a checkpoint brings back",
}
