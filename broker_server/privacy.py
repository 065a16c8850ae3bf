"""What a run's privacy costs: epsilon after so many rounds, and the noise that buys it.

Every round is one Gaussian mechanism on a sum that one device changes by at most
``clip_norm`` (see ``strategies.private_sum``). Every device may be in every round, so
rounds compose without any amplification: a cohort is drawn from the run's seed, which
is no secret, among devices that happen to be online, which is no uniform sample;
"amplification by subsampling" would claim what does not hold. T rounds of noise z are
then exactly one Gaussian mechanism of noise z / sqrt(T).

Source: dp-accounting, analytic Gaussian mechanism (arXiv:1805.06530); composition of
Gaussian mechanisms as in arXiv:1905.02383.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import numpy as np

from broker_server.run_spec import PrivacySettings
from broker_server.strategies.private_sum import PrivacyRule
from broker_server.strategies.protected import NoiseSource, os_noise
from wire_protocol.errors import ConfigError


def epsilon_after(privacy: PrivacySettings, rounds: int) -> float | None:
    """Epsilon of the first ``rounds`` rounds together at the run's delta.

    Returns:
        None with a noise seed for tests: who knows the noise can take it off.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    if privacy.test_noise_seed is not None:
        return None
    if rounds == 0:
        return 0.0
    noise = privacy.noise_multiplier / math.sqrt(rounds)
    return _epsilon(noise, privacy.delta)


def privacy_rule(privacy: PrivacySettings | None) -> PrivacyRule | None:
    """Norm and noise, as the strategies read them."""
    if privacy is None:
        return None
    return PrivacyRule(privacy.clip_norm, privacy.noise_multiplier)


def noise_source(privacy: PrivacySettings | None) -> NoiseSource:
    """Noise seeded from the operating system, or the same each time for tests."""
    if privacy is None or privacy.test_noise_seed is None:
        return os_noise
    seed = privacy.test_noise_seed
    return lambda rounds_done: np.random.default_rng([seed, rounds_done])


def privacy_report(
    privacy: PrivacySettings, *, rounds_done: int, rounds_planned: int
) -> Mapping[str, float | bool | None]:
    """What a run's summary says about its privacy.

    ``epsilon_planned`` holds however the run ends; ``epsilon`` is that of the rounds
    done, for a run that was not stopped because of what came out.
    """
    return {
        "clip_norm": privacy.clip_norm,
        "noise_multiplier": privacy.noise_multiplier,
        "delta": privacy.delta,
        "epsilon": epsilon_after(privacy, rounds_done),
        "epsilon_round": epsilon_after(privacy, 1),
        "epsilon_planned": epsilon_after(privacy, rounds_planned),
        "noise_is_secret": privacy.test_noise_seed is None,
    }


@functools.lru_cache(maxsize=4096)
def _epsilon(noise: float, delta: float) -> float:
    try:
        # SciPy comes with it: a second and tens of megabytes, for private runs alone.
        from dp_accounting import get_epsilon_gaussian  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError("privacy needs dp-accounting: pip install dp-accounting") from error
    return float(get_epsilon_gaussian(noise, delta))
