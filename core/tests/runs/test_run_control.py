"""What is asked of a run, on any rank, and the course that the ranks agree on."""

from hypothesis import given
from hypothesis import strategies as st
from luthier.runs.writing.run_control import Course, RunControl


@given(stop=st.none() | st.text(), number=st.none() | st.integers(1, 31), saves=st.booleans(), evaluates=st.booleans())
def test_a_signal_goes_before_a_request_to_stop(stop, number, saves, evaluates):
    control = RunControl()
    control.agree(stop, saves=saves, evaluates=evaluates, signal=number)
    expected = Course.ON if stop is None else Course.STOPPED
    assert control.course is (expected if number is None else Course.INTERRUPTED)
    assert (control.wants_save, control.wants_evaluation) == (saves, evaluates)


def test_a_signal_elsewhere_ends_the_step_without_being_heard_here():
    control = RunControl()
    control.agree(None, saves=False, evaluates=False, signal=15)
    assert (control.signal, control.agreed_signal, control.is_ending) == (None, 15, False)


def test_an_evaluation_that_has_begun_is_owed_until_it_is_complete():
    control = RunControl(wants_evaluation=True)
    control.begin_evaluation()
    assert (control.wants_evaluation, control.owes_evaluation) == (False, True)
    control.complete_evaluation()
    assert not control.owes_evaluation
