"""The conformance kit on each loss, with every loss type among the examples."""

from luthier.testing import conformance
from luthier_preference import Cpo, Dpo, Kto, Orpo, Simpo, luthier_losses
from luthier_preference.dpo import FORMULAS

EVERY = [Dpo(loss_type=name, label_smoothing=0.1 if name in ("robust", "exo_pair") else 0.0) for name in FORMULAS]
RECORDS = {record.name: record for record in luthier_losses()}


@conformance([RECORDS["dpo"]], examples=[*EVERY, Dpo(label_smoothing=0.2)])
def test_dpo_conforms(check):
    check()


@conformance([RECORDS["orpo"]], examples=[Orpo(nll_scope="full"), Orpo(beta=1.0)])
def test_orpo_conforms(check):
    check()


@conformance([RECORDS["simpo"]], examples=[Simpo(label_smoothing=0.1), Simpo(beta=10.0, gamma=5.0)])
def test_simpo_conforms(check):
    check()


@conformance([RECORDS["cpo"]], examples=[Cpo(loss_type="hinge"), Cpo(loss_type="ipo"), Cpo(cpo_alpha=0.0)])
def test_cpo_conforms(check):
    check()


@conformance([RECORDS["kto"]], examples=[Kto(desirable_weight=2.0, undesirable_weight=0.5)])
def test_kto_conforms(check):
    check()
