# Nothing: the answer says that somebody is there to answer. Data: { }.
param($data)
@{ }
