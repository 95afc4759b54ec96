"""What two processes can compare a policy by."""

import art


async def greedy_logprobs(model: art.TrainableModel, question: str) -> list[float]:
    """Of the tokens of the likeliest reply to ``question``."""
    completion = await model.openai_client().chat.completions.create(
        model=model.get_inference_name(),
        messages=[{"role": "user", "content": question}],
        max_tokens=16,
        temperature=0.0,
        logprobs=True,
    )
    return [token.logprob for token in completion.choices[0].logprobs.content or []]
