def test_a_page_shows_the_calls_of_the_training(train):
    folder = train("data.rows=2000", "data.click_rate=0.3", "trainer/profiler=calls")

    page = (folder / "csv" / "calls.html").read_text()
    assert "training_step" in page
    assert "<html" in page
    assert (folder / "result.json").exists()
